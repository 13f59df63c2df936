"""The writing of files: through links, into what is no regular file, probed first, whole or not at all, by one module."""

import ast
import errno
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import icrl
from icrl import files
from icrl.training import checkpoint
from icrl.worlds import TabularTasks, sample_anymdp, sample_bandit, sample_garnet, sample_pomdp

ROOT = os.geteuid() == 0


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- where a path leads --------------------------------------------------------------------------------------------------


def test_a_link_stays_and_its_target_is_written(tmp_path):
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    (far / "old").write_text("old")
    (near / "one").symlink_to("../far/old")
    (near / "two").symlink_to(near / "one")
    (near / "new").symlink_to("../far/new")  # to nothing yet
    (tmp_path / "folder").symlink_to(near)
    for name, target in (("two", "old"), ("new", "new")):
        files.probe(near / name)
        files.write_text(tmp_path / "folder" / name, "written")
        assert (near / name).is_symlink()
        assert (far / target).read_text() == "written"
    assert names(far) == ["new", "old"]
    assert names(near) == ["new", "one", "two"]


def test_a_pipe_is_written_into(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    files.probe(pipe)  # does not open it: its reader would see an end
    big = os.urandom(1 << 20)
    files.write_bytes(pipe, big)
    reader.join(20)
    assert got == [big]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not ROOT, reason="making a device needs root")
@pytest.mark.parametrize(("minor", "fails"), [(3, False), (7, True)], ids=["null", "full"])
def test_a_device_is_written_into(minor, fails, tmp_path):
    device, link = tmp_path / "device", tmp_path / "link"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        device.open("rb").close()
    except PermissionError:
        pytest.skip("no devices here")
    link.symlink_to(device)
    for path in (device, link):
        files.probe(path)
        if fails:
            with pytest.raises(OSError, match=f"cannot write {path} .No space left on device.") as refused:
                files.write_text(path, "x")
            assert refused.value.errno == errno.ENOSPC
        else:
            files.write_text(path, "x")
        assert stat.S_ISCHR(device.stat().st_mode)
        assert names(tmp_path) == ["device", "link"]


DESCRIPTORS = """
import sys
from pathlib import Path
from icrl import files
print("before")
for path in map(Path, sys.argv[1:]):
    files.probe(path)
    files.write_text(path, "written\\n")
print("after")
"""


def run_python(script, *args, **options):
    where = Path(icrl.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], cwd=where, check=True, timeout=120, **options
    )


def test_an_open_descriptor_is_written_into(tmp_path):
    """/dev/stdout leads to where stdout does, be that a file, a pipe or a link in /proc; what was printed is not lost."""
    link = tmp_path / "link"
    link.symlink_to("/dev/stdout")
    with open(tmp_path / "file", "w") as file:
        run_python(DESCRIPTORS, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", link, stdout=file)
    wanted = "before\n" + 4 * "written\n" + "after\n"
    assert (tmp_path / "file").read_text() == wanted
    piped = run_python(DESCRIPTORS, "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", link, stdout=subprocess.PIPE)
    assert piped.stdout.decode() == wanted
    assert names(tmp_path) == ["file", "link"]


# ---- before the work -----------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(folder):
    """A file system of 16 KB, mounted at a folder; its two blocks that are free are taken."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip("mounting needs root")
    try:
        (folder / "filler").write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize))
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def unwritable(tmp_path, kind):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    if kind == "link to itself":
        (tmp_path / "loop").symlink_to("loop")
    if kind == "link into no folder":
        (tmp_path / "lost").symlink_to("absent/file")
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(tmp_path / "socket"))
    if kind == "partial file is a folder":
        (tmp_path / "x.part").mkdir()
    return {
        "folder": (tmp_path / "folder", "Is a directory"),
        "below a file": (tmp_path / "file" / "x", "Not a directory"),
        "no such folder": (tmp_path / "absent" / "x", "No such file or directory"),
        "a system's folder": (Path("/sys/x"), "(Permission denied|Operation not permitted|Read-only file system)"),
        "link to itself": (tmp_path / "loop", "Too many levels of symbolic links"),
        "link into no folder": (tmp_path / "lost", "No such file or directory"),
        "long name": (tmp_path / ("x" * 300), "File name too long"),
        "socket": (tmp_path / "socket", "it is a socket"),
        "partial file is a folder": (tmp_path / "x", "Is a directory"),
        "closed descriptor": (Path("/dev/fd/987"), "Bad file descriptor"),
        "descriptor for reading": (Path("/dev/fd/0"), "it is open for reading alone"),
    }[kind]


KINDS = ["folder", "below a file", "no such folder", "a system's folder", "link to itself", "link into no folder"]
KINDS += ["long name", "socket", "partial file is a folder", "closed descriptor", "descriptor for reading"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written_is_refused(kind, tmp_path):
    path, why = unwritable(tmp_path, kind)
    before, stdin = names(tmp_path), os.dup(0)
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for refuse in (files.probe, lambda p: files.write_text(p, "x")):
            with pytest.raises(OSError, match=f"^cannot write {path} \\({why}") as refused:
                refuse(path)
            assert "\n" not in str(refused.value)
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    assert names(tmp_path) == before


def test_a_probe_leaves_all_as_it_is(tmp_path):
    old = tmp_path / "old"
    old.write_text("old")
    before = old.stat()
    for path in (old, tmp_path / "new"):
        files.probe(path)
    files.probe_folder(tmp_path)
    files.probe_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == ["old"]
    after = old.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert old.read_text() == "old"


def test_a_full_disk_is_refused_before_the_work_and_in_it(tmp_path):
    with full_disk(tmp_path / "small") as small:
        said = "cannot write .*small.* .No space left on device."
        for refuse in (files.probe, lambda p: files.write_text(p, "x"), lambda p: files.probe_folder(p.parent)):
            with pytest.raises(OSError, match=said):
                refuse(small / "new")
        assert names(small) == ["filler"]


def test_a_file_system_for_reading_alone_is_refused(tmp_path):
    folder = tmp_path / "read_only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        for refuse, path in (
            (files.probe, folder / "x"),
            (files.probe_folder, folder),
            (files.probe_folder, folder / "a"),
        ):
            with pytest.raises(OSError, match=f"cannot write {path} .Read-only file system."):
                refuse(path)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("path", "why"), [("file", "Not a directory"), ("file/a/b", "Not a dir"), ("lost/a", "link")])
def test_a_folder_that_cannot_be_made_is_refused(path, why, tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "lost").symlink_to("nothing")
    with pytest.raises(OSError, match=f"cannot write {tmp_path / path} .*{why}"):
        files.probe_folder(tmp_path / path)


# ---- whole or not at all -------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write {path} .File too large."):
            files.write_bytes(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_what_a_kill_left_is_taken_away(tmp_path):
    part = tmp_path / "x.part"
    part.write_bytes(bytes(9999))
    part.chmod(0o600)
    files.write_text(tmp_path / "x", "new")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask()
    outside = tmp_path / "outside"
    outside.write_text("precious")
    part.symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        files.write_text(tmp_path / "x", "newer")
    assert outside.read_text() == "precious"


def test_writers_of_one_file_take_turns(tmp_path):
    path, seen = tmp_path / "x", []
    texts = [str(i) * (10_000 + i) for i in range(6)]

    def write(text):
        for _ in range(20):
            files.write_text(path, text)
            seen.append(path.read_text() in texts)

    crew = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert seen == [True] * 120
    assert names(tmp_path) == ["x"]


def test_a_file_that_is_mounted_keeps_its_place(tmp_path):
    behind, place = tmp_path / "behind", tmp_path / "place"
    behind.write_text("a long old text")
    place.write_text("")
    if subprocess.run(["mount", "--bind", behind, place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        files.probe(place)
        files.write_text(place, "new")
        assert behind.read_text() == "new"
    finally:
        subprocess.run(["umount", place], check=True)
    assert names(tmp_path) == ["behind", "place"]


# ---- permissions ---------------------------------------------------------------------------------------------------------


def umask():
    found = os.umask(0)
    os.umask(found)
    return found


def test_new_files_have_what_the_umask_leaves_and_old_ones_keep_theirs(tmp_path):
    figure = Figure()
    writers = {
        "text": lambda p: files.write_text(p, "x"),
        "json": lambda p: files.write_json(p, {}),
        "log": lambda p: files.append_text(p, "x"),
        "figure.png": lambda p: files.write_figure(p, figure, 30),
        "checkpoint": lambda p: checkpoint.save(p, {"a": torch.zeros(2)}, {}),
        "tasks": lambda p: sample_bandit(2, 3, seed=0).save(p),
    }
    before = umask()
    try:
        for mask in (0o022, 0o027, 0o077):
            os.umask(mask)
            for name, write in writers.items():
                write(path := tmp_path / f"{mask}-{name}")
                assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, name
                path.chmod(0o640)
                write(path)
                assert stat.S_IMODE(path.stat().st_mode) == 0o640, name
    finally:
        os.umask(before)


# ---- locks ---------------------------------------------------------------------------------------------------------------

HOLDER = "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"


def test_a_lock_ends_with_its_process(tmp_path):
    with files.locked(tmp_path / "new", wait=False):
        pass
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / files.LOCK], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with (
            pytest.raises(ValueError, match=f"out: another process is at work in {tmp_path}"),
            files.locked(tmp_path, wait=False),
        ):
            pass
        other.kill()
        with files.locked(tmp_path):  # waits for its end
            pass


# ---- one of everything ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(()).expand(1),
        torch.tensor([7]).expand(1, 1),
        torch.arange(6)[2:3],
        torch.arange(6)[::5][1:],
        torch.zeros(3, 0),
        torch.tensor(True),
        torch.ones(1, 1, 4).expand(1, 3, 4),
        torch.arange(6).view(2, 3).T,
    ],
    ids=lambda t: f"{list(t.shape)}{list(t.stride())}",
)
def test_tensors_of_any_strides_are_saved(tensor, tmp_path):
    assert files.checksum({"a": tensor}) == files.checksum({"a": tensor.clone(memory_format=torch.contiguous_format)})
    checkpoint.save(tmp_path / "c", {"a": tensor}, {})
    assert torch.equal(checkpoint.load(tmp_path / "c")[0]["a"], tensor)


@pytest.mark.parametrize(
    "tasks",
    [
        lambda: sample_anymdp(1, 8, seed=0),
        lambda: sample_garnet(1, 4, seed=0),
        lambda: sample_garnet(1, 2, 1, seed=0, branching=1),
        lambda: sample_bandit(1, 2, seed=0),
        lambda: sample_pomdp(1, 8, seed=0),
        lambda: sample_anymdp(3, 8, seed=0)[[1]],
        lambda: sample_anymdp(1, 8, seed=0).dense(),
    ],
    ids=["anymdp", "garnet", "one action", "bandit", "pomdp", "one of three", "dense"],
)
def test_one_task_is_saved(tasks, tmp_path):
    tasks = tasks()
    tasks.save(tmp_path / "t")
    loaded = TabularTasks.load(tmp_path / "t")
    assert len(loaded) == 1
    for name, tensor in tasks.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor), name


# ---- by one module -------------------------------------------------------------------------------------------------------

METHODS = {
    "write_text",
    "write_bytes",
    "savefig",
    "save_file",
    "tofile",
    "touch",
    "symlink_to",
    "hardlink_to",
    "truncate",
}
METHODS |= {"to_csv", "to_json", "imsave", "umask"}
PATHS = {
    "os.open",
    "os.replace",
    "os.rename",
    "os.truncate",
    "os.umask",
    "os.mkfifo",
    "os.link",
    "os.symlink",
    "io.open",
}
PATHS |= {"torch.save", "np.save", "np.savez", "np.savetxt", "json.dump", "pickle.dump", "plt.savefig", "shutil.move"}
PATHS |= {f"shutil.copy{x}" for x in ("", "2", "file", "tree", "fileobj")}
FUNCTIONS = {"save_file"}


def writes(tree: ast.AST) -> list[str]:
    """Calls of a module that write files; opening os.devnull is none."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            given = {node.module} if isinstance(node, ast.ImportFrom) else set()
            modules = given | {alias.name for alias in node.names}
            found += [f"{node.lineno}: {m}" for m in modules & {"tempfile", "fcntl", *FUNCTIONS}]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        opens = called == "open" or (last == "open" and called not in ("os.open", "io.open"))
        if opens:
            place = 1 if called == "open" else 0
            mode = node.args[place] if len(node.args) > place else None
            mode = next((k.value for k in node.keywords if k.arg == "mode"), mode)
            reads = mode is None or (isinstance(mode, ast.Constant) and not set(str(mode.value)) & set("wax+"))
            if not reads and "os.devnull" not in map(ast.unparse, node.args):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif called in PATHS or called in FUNCTIONS or ("." in called and last in METHODS):
            if called == "os.open" and node.args and ast.unparse(node.args[0]) == "os.devnull":
                continue
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_one_module_writes_files():
    package = Path(icrl.__file__).parent
    faults = {}
    for path in package.rglob("*.py"):
        found = writes(ast.parse(path.read_text()))
        if path == package / "files.py":
            assert len(found) > 5
            assert not [line for line in found if "umask" in line]
        elif found:
            faults[str(path.relative_to(package))] = found
    assert not faults


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "open(path, how)",
        "path.open('r+')",
        "path.write_text('x')",
        "figure.savefig(path)",
        "from safetensors.torch import save_file",
        "safetensors.torch.save_file(t, path)",
        "import os\nos.replace(a, b)",
        "json.dump(x, file)",
        "import tempfile",
        "os.umask(0)",
    ],
)
def test_a_module_that_writes_is_found(line):
    assert writes(ast.parse(line))
    assert not writes(
        ast.parse("open(path)\nopen(path, 'rb')\npath.open()\nwrite_text(path, 'x')\na.replace('b', 'c')")
    )
