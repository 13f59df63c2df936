import ast, pathlib
BASE = pathlib.Path("/tmp/w/tables/icrl_kernels")
import textwrap
def wrap(doc):
    out = []
    for part in doc.split("¶"):
        if out and part.startswith("¶"):
            pass
        for i, par in enumerate(part.strip().split("\n\n")):
            if i:
                out.append("")
            first = '"""' if not out else ""
            out += textwrap.wrap(first + " ".join(par.split()), 120, initial_indent="    ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    if len(out[-1]) + 3 <= 120 and "" not in out:
        out[-1] += '"""'
    else:
        out.append('    """')
    return out
def apply(path, module, docs):
    """Replace the module's docstring and those of functions (added where there is none)."""
    p = BASE / path
    import subprocess
    text = subprocess.run(["git", "-C", "/tmp/w/tables", "show", f"HEAD:icrl_kernels/{path}"], capture_output=True, text=True, check=True).stdout
    lines = text.split("\n")
    tree = ast.parse(text)
    edits = []  # start line (0-based), end (exclusive), new lines
    def has(node):
        b = node.body[0]
        return isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant) and isinstance(b.value.value, str)
    b = tree.body[0]
    edits.append((b.lineno - 1, b.end_lineno, ('"""' + module.strip("\n") + ('\n"""' if "\n" in module.strip("\n") else '"""')).split("\n")))
    done = set()
    for f in tree.body:
        if isinstance(f, ast.FunctionDef) and f.name in docs:
            done.add(f.name)
            d = wrap(docs[f.name].strip("\n"))
            new = d
            b = f.body[0]
            if has(f):
                edits.append((b.lineno - 1, b.end_lineno, new))
            else:
                at = b.lineno - 1
                # comments before the first statement stay after the docstring
                while lines[at - 1].strip().startswith("#"):
                    at -= 1
                edits.append((at, at, new))
    assert done == set(docs), set(docs) - done
    for a, e, new in sorted(edits, reverse=True):
        lines[a:e] = new
    out = "\n".join(lines)
    p.write_text(out)
    long = [(i + 1, len(x)) for i, x in enumerate(out.split("\n")) if len(x) > 120]
    print(path, len(out.split("\n")) - 1, "lines; over 120:", long)
