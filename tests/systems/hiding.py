"""Makes this process like one on another system, as slm's modules see it; other packages see the system as it is.

`install("bare")` hides what only some POSIX systems have: `fcntl`, `resource`, `readline`, `/proc`, `/sys`, `os.fork`, most
signals. `install("windows")` also shows `os.name` and `sys.platform` of Windows, and keeps its rules for files: one that is
open or mapped in this process cannot be renamed or removed, and a directory cannot be opened. Children of `slm.core.child` are
like their parent. They import this file too, so it needs the standard library only.
"""

import builtins
import errno
import importlib.util
import os
import stat
import sys
import types
from pathlib import Path

MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog", "curses", "posix"}
OF_OS = set(
    [
        "fork",
        "forkpty",
        "getuid",
        "geteuid",
        "getgid",
        "getegid",
        "getpgid",
        "getpgrp",
        "setsid",
        "killpg",
        "nice",
        "setpriority",
        "getpriority",
        "PRIO_PROCESS",
        "sched_getaffinity",
        "sched_setaffinity",
        "sysconf",
        "statvfs",
        "ST_RDONLY",
        "register_at_fork",
        "mkfifo",
        "mknod",
        "chown",
        "lchown",
        "fchown",
        "fchmod",
        "major",
        "minor",
        "makedev",
        "getloadavg",
        "uname",
        "wait",
        "wait3",
        "wait4",
        "WNOHANG",
        "O_NOFOLLOW",
        "O_DIRECTORY",
        "O_CLOEXEC",
        "O_NONBLOCK",
        "posix_fadvise",
        "pread",
        "pwrite",
        "set_blocking",
        "get_blocking",
        "memfd_create",
        "sendfile",
        "fdatasync",
        "sync",
        "openpty",
        "pipe2",
        "readv",
        "writev",
        "setxattr",
        "getxattr",
        "posix_spawn",
    ]
)
OF_SIGNAL = set(
    [
        "SIGHUP",
        "SIGUSR1",
        "SIGUSR2",
        "SIGKILL",
        "SIGPROF",
        "SIGALRM",
        "SIGCHLD",
        "SIGPIPE",
        "SIGQUIT",
        "SIGTSTP",
        "SIGSTOP",
        "SIGCONT",
        "SIGTTIN",
        "SIGTTOU",
        "setitimer",
        "getitimer",
        "ITIMER_PROF",
        "ITIMER_REAL",
        "ITIMER_VIRTUAL",
        "alarm",
        "pause",
        "pthread_sigmask",
        "pthread_kill",
        "sigwait",
        "sigtimedwait",
        "SIG_BLOCK",
        "SIG_UNBLOCK",
        "SIG_SETMASK",
        "siginterrupt",
    ]
)
OF_MMAP = {"MAP_PRIVATE", "MAP_SHARED", "MAP_ANONYMOUS", "PROT_READ", "PROT_WRITE"}
HIDDEN = {"os": OF_OS, "signal": OF_SIGNAL, "socket": {"AF_UNIX"}, "mmap": OF_MMAP, "select": {"poll", "epoll"}}
# Windows' number of Ctrl-Break. Linux has a signal of this number too, so it can be sent.
BREAK = 21
_CREATE_NEW_PROCESS_GROUP = 0x200


class Partial(types.ModuleType):
    """A module without some names, and with others in the place of its own."""

    def __init__(self, real, hidden, shown):
        super().__init__(real.__name__)
        self.__dict__.update(_real=real, _hidden=frozenset(hidden), **shown)

    def __getattr__(self, name):
        if name in self._hidden:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        return getattr(self._real, name)

    def __setattr__(self, name, value):
        setattr(self._real, name, value)

    def __dir__(self):
        return [name for name in dir(self._real) if name not in self._hidden]


def install(system):
    """Makes this process "bare" or like "windows". Call it before any module of slm is imported."""
    windows = system == "windows"
    partial = {
        name: Partial(importlib.import_module(name), hidden, _shown(name, windows)) for name, hidden in HIDDEN.items()
    }
    if windows:
        for name in ("sys", "subprocess", "ctypes"):
            partial[name] = Partial(importlib.import_module(name), (), _shown(name, windows))
        partial["winreg"] = _registry()
    usual = builtins.__import__

    def importing(name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and _is_ours(globals):
            if name.partition(".")[0] in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in partial:
                return partial[name]
        return usual(name, globals, locals, fromlist, level)

    builtins.__import__ = importing
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name in MODULES else find(name, package)
    sys.addaudithook(lambda event, arguments: _opening(event, arguments, windows))
    if windows:
        _share_nothing()
    from slm.core import child

    python = child.python
    child.python = lambda code, *arguments: python(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import hiding; sys.path.pop(0); hiding.install({system!r})\n{code}",
        *arguments,
    )


def _is_ours(globals):
    name = (globals or {}).get("__name__") or ""
    return name == "slm" or name.startswith("slm.")


def _shown(name, windows):
    """What slm sees in a module instead of its own names."""
    if not windows:
        return {}
    import ctypes
    import select
    import signal
    import subprocess

    def kill(pid, number):
        assert number, "os.kill(pid, 0) ends a process on Windows"
        os.kill(pid, number)

    def wait(readable, writable, broken, timeout=None):
        for each in (*readable, *writable, *broken):
            assert hasattr(each, "getsockname"), "Windows waits for sockets alone"
        return select.select(readable, writable, broken, timeout)

    def start(*arguments, creationflags=0, start_new_session=False, **options):
        assert not start_new_session and creationflags in (0, _CREATE_NEW_PROCESS_GROUP)
        options |= {"start_new_session": creationflags == _CREATE_NEW_PROCESS_GROUP}
        return subprocess.Popen(*arguments, **options)

    def symlink(*arguments, **options):
        raise OSError(errno.EINVAL, "A required privilege is not held by the client")

    class Library(ctypes.CDLL):
        def __init__(self, name, *arguments, **options):
            if name is None:
                raise TypeError("LoadLibrary() argument 1 must be str, not None")
            super().__init__(name, *arguments, **options)

    return {
        "os": {"name": "nt", "kill": kill, "symlink": symlink},
        "signal": {"SIGBREAK": signal.Signals(BREAK)},
        "select": {"select": wait},
        "sys": {"platform": "win32"},
        "subprocess": {"Popen": start, "CREATE_NEW_PROCESS_GROUP": _CREATE_NEW_PROCESS_GROUP},
        "ctypes": {"CDLL": Library},
    }.get(name, {})


def _registry():
    """The part of `winreg` that slm reads."""
    import contextlib

    values = {"LongPathsEnabled": 0, "ProcessorNameString": " Some Processor "}
    registry = types.ModuleType("winreg")
    registry.HKEY_LOCAL_MACHINE = None
    registry.OpenKey = lambda key, path: contextlib.nullcontext(path)
    registry.QueryValueEx = lambda key, name: (values[name], 1)
    return registry


def _opening(event, arguments, windows):
    """Denies slm the files of Linux, and the opening of a directory on Windows."""
    if event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], (str, bytes)):
        return
    path = os.fsdecode(arguments[0])
    linux = path.startswith(("/proc", "/sys"))
    if not (linux or (windows and event == "open")) or not _for_ours():
        return
    if linux:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return
    if is_directory:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


_LIBRARY = str(Path(os.__file__).parent)


def _for_ours():
    """Whether slm calls, directly or through the standard library."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code is _in_use.__code__ or file.endswith(
            "tempfile.py"
        ):  # which opens a directory for a nameless file
            return False
        if _is_ours(frame.f_globals):
            return True
        standard = file.startswith(("<frozen", _LIBRARY)) and "site-packages" not in file
        if not standard and file != __file__:
            return False
        frame = frame.f_back
    return False


def _in_use(path):
    """Returns a file at or below a path that is open or mapped in this process; None if there is none."""
    path = os.path.realpath(path)
    used = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            used.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    with open("/proc/self/maps", encoding="utf-8") as maps:
        used |= {line.split(None, 5)[5].rstrip("\n") for line in maps if len(line.split(None, 5)) == 6}
    return next((each for each in sorted(used) if each == path or each.startswith(f"{path}/")), None)


REFUSED = []


def _share_nothing():
    """Files that are open or mapped are neither renamed nor removed, below the working directory."""
    import shutil

    home = os.path.realpath(os.curdir)
    # Removes by path, as on Windows; since 3.14 the choice is made when the module is imported.
    shutil._use_fd_functions = False
    if hasattr(shutil, "_rmtree_impl"):
        shutil._rmtree_impl = shutil._rmtree_unsafe

    def guarded(real):
        def call(path, *arguments, **options):
            for each in (path, *arguments[:1]):
                inside = isinstance(each, (str, os.PathLike)) and os.path.realpath(each).startswith(home)
                if inside and (used := _in_use(each)) is not None:
                    REFUSED.append((real.__name__, used))
                    raise PermissionError(errno.EACCES, f"another process uses {used}", os.fspath(path))
            return real(path, *arguments, **options)

        return call

    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, guarded(getattr(os, name)))
