import ast, subprocess
F="linear_attention/triton/common linear_attention/triton/gla_kernels linear_attention/triton/gsa_kernels linear_attention/triton/gated_delta_rule_kernels linear_attention/triton/rwkv7_kernels tabular/anymdp_triton".split()
def strip(t):
    t=ast.parse(t)
    for n in ast.walk(t):
        if isinstance(n,(ast.Module,ast.FunctionDef,ast.ClassDef)):
            b=n.body
            if b and isinstance(b[0],ast.Expr) and isinstance(b[0].value,ast.Constant) and isinstance(b[0].value.value,str): n.body=b[1:]
    return ast.dump(t)
import re
for f in F:
    new=open(f"/tmp/w/tables/icrl_kernels/{f}.py").read()
    old=subprocess.run(["git","-C","/work/main","show",f"67b0678:icrl_kernels/{f}.py"],capture_output=True,text=True,check=True).stdout
    com=lambda s:[m for l in s.split("\n") for m in re.findall(r"#.*",l)]
    print(f, strip(new)==strip(old), com(new)==com(old), new.count("\n"))
    # every kernel argument named in the module docstring
    t=ast.parse(new); doc=ast.get_docstring(t)
    for n in t.body:
        if isinstance(n,ast.FunctionDef) and n.decorator_list:
            miss=[a.arg for a in n.args.args if not re.search(rf"(?<![\w]){a.arg}(?![\w])",doc)]
            if miss: print("   ",n.name,miss)
            if not ast.get_docstring(n): print("    no docstring",n.name)
