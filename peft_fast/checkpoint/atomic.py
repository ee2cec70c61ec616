"""Replace several files of one directory at once: after a kill at any moment, all are old or all are new.

Two ways, chosen by what the directory holds:

* exchange: when every entry is replaced by this save, a complete new directory is written beside the old one and the
  two change places in one system call (`renameat2` with RENAME_EXCHANGE, Linux), so that every reader sees either one;
  a directory that does not exist or is empty takes a plain rename;
* journal: when there are other entries (sub-folders of other adapters, a Trainer's optimizer state) or no exchange,
  the new files are written to a folder inside the directory. Renaming that folder to `JOURNAL` is the commit; then
  the files are moved to their places. A kill between leaves the journal, which `recover` (called before every load and
  save) rolls forward; where the directory cannot be written, `locate` reads through it.

Every file is synced before the commit, every directory whose entries changed after it. Staging folders left by killed
saves are recognised by the lock that their owner no longer holds, and removed by the next save.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOURNAL = ".peft_fast-journal"
_STAGING = ".peft_fast-staging-"
_REMOVED = "removed-"  # an empty file of this prefix in a journal: the entry of that name goes away
_EXCHANGE = 2
_AT_FDCWD = -100
_ABANDONED_AFTER_S = 24 * 3600.0  # only where there are no locks

Writer = Callable[[Path], None]


def replace_files(
    directory: str | os.PathLike[str], writers: Mapping[str, Writer], *, removed: Collection[str] = ()
) -> None:
    """Write the files of `writers` (name -> function that writes the path it is given) into `directory`, all or none.

    Args:
        directory: created with its parents if it does not exist; a link to a directory is followed.
        removed: names of files that the new ones supersede; they disappear in the same step. Every other entry stays.
    Raises: ValueError if `directory` is a file or a name is not a plain file name; OSError from the file system and
        whatever a writer raises: then the directory is as it was.
    """
    for name in (*writers, *removed):
        if os.path.basename(name) != name or name.startswith(".") or not name:
            raise ValueError(f"{name!r} is not the name of a file that can be saved into {directory}")
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise ValueError(f"{directory} should be a directory, it is a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = {*writers, *removed}
    if target.exists():
        recover(target)
        _remove_abandoned(target, _STAGING, replaced)
    _remove_abandoned(target.parent, f"{_STAGING}{target.name}-", replaced)
    if _can_stage_beside(target, replaced):
        with _staged(target.parent, f"{_STAGING}{target.name}-", target, writers, replaced) as staging:
            _put_in_place(staging, target, replaced, removed)
    else:
        with _staged(target, _STAGING, target, writers, replaced) as staging:
            _commit_journal(staging, target, removed)


def recover(directory: str | os.PathLike[str]) -> bool:
    """Finish the save that was interrupted after its commit, if there is one. Returns whether the directory is whole.

    False: there is a journal and the directory cannot be written; `locate` finds the files through it.
    Raises: ValueError if the journal is not one that a save wrote.
    """
    target = Path(os.path.realpath(directory))
    if not os.path.lexists(target / JOURNAL):
        return True
    _check_journal(target / JOURNAL)
    try:
        with _locked(target):
            _roll_forward(target)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return False
        raise
    return True


def locate(directory: str | os.PathLike[str], name: str) -> Path | None:
    """The path of file `name` of a directory, seen through a committed journal; None if there is no such file."""
    journal = Path(directory) / JOURNAL
    if os.path.lexists(journal):
        _check_journal(journal)
        if (journal / name).exists():
            return journal / name
        if (journal / f"{_REMOVED}{name}").exists():
            return None
    path = Path(directory) / name
    return path if path.exists() else None


# ------------------------------------------------------------------------------------------------ staging
@contextlib.contextmanager
def _staged(
    parent: Path, prefix: str, target: Path, writers: Mapping[str, Writer], ours: Collection[str]
) -> Iterator[Path]:
    """A locked new folder in `parent` with all files written and synced; what is left of it afterwards is removed."""
    staging, lock = _new_staging(parent, prefix)
    try:
        for name, write in writers.items():
            path, old = staging / name, target / name
            with open(path, "xb"):
                pass
            # A save keeps the mode of the file that it replaces; a new file has what the umask gives (safetensors,
            # left alone, makes it 0600).
            mode = stat.S_IMODE(os.stat(old if old.is_file() else path).st_mode)
            write(path)
            os.chmod(path, mode)
            _sync(path)
        _sync(staging)
        yield staging
    finally:
        _discard(staging, ours)
        if lock is not None:
            os.close(lock)


def _new_staging(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """Make a folder and lock it; a cleaner that was faster than the lock makes this try again."""
    while True:
        staging = parent / f"{prefix}{secrets.token_hex(6)}"
        os.mkdir(staging)
        if fcntl is None:
            return staging, None
        with contextlib.suppress(FileNotFoundError):
            lock = _lock(staging, fcntl.LOCK_EX)
            if staging.exists():
                return staging, lock
            os.close(lock)


def _remove_abandoned(parent: Path, prefix: str, ours: Collection[str]) -> None:
    """Remove the staging folders of saves that were killed: nobody holds their lock."""
    with contextlib.suppress(OSError):  # cleaning is a courtesy, it never fails a save
        for name in os.listdir(parent):
            staging = parent / name
            if not name.startswith(prefix) or staging.is_symlink() or not staging.is_dir():
                continue
            if fcntl is None:
                if time.time() - os.stat(staging).st_mtime > _ABANDONED_AFTER_S:
                    _discard(staging, ours)
                continue
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                lock = _lock(staging, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _discard(staging, ours)
                os.close(lock)


def _lock(directory: Path, operation: int) -> int:
    """Open a directory and lock it; where the file system has no locks, only open it. Closing releases."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return descriptor


def _discard(staging: Path, ours: Collection[str]) -> None:
    """Remove the files of a save from a staging folder, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        for name in os.listdir(staging):
            if name in ours or name.startswith(_REMOVED):
                os.unlink(staging / name)
        os.rmdir(staging)


# ------------------------------------------------------------------------------------------------ commit
def _can_stage_beside(target: Path, replaced: Collection[str]) -> bool:
    """Whether a new directory may take the place of the old one without anybody missing something."""
    if not target.exists():
        return True
    if os.name == "nt" or not os.access(target, os.W_OK) or not os.access(target.parent, os.W_OK | os.X_OK):
        return False
    if os.stat(target).st_dev != os.stat(target.parent).st_dev:  # a mount point
        return False
    with contextlib.suppress(OSError):
        if os.path.samefile(target, os.getcwd()):  # the process would be left in the removed directory
            return False
    return all(name in replaced and stat.S_ISREG(os.lstat(target / name).st_mode) for name in os.listdir(target))


def _put_in_place(staging: Path, target: Path, replaced: Collection[str], removed: Collection[str]) -> None:
    """Let `staging` become `target`; the old directory, if any, is then where staging was."""
    if not target.exists():
        try:
            os.rename(staging, target)
            _sync(target.parent)
            return
        except OSError as error:  # another process has just made it
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    old, new = os.stat(target), os.stat(staging)
    os.chmod(staging, stat.S_IMODE(old.st_mode))
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid) or not _exchange(staging, target):
        _commit_journal(staging, target, removed)
        return
    _sync(target.parent)
    with contextlib.suppress(FileNotFoundError):  # the next save of another process may have cleaned up already
        for name in set(os.listdir(staging)) - set(replaced):  # came into the old directory after it was looked at
            if not os.path.lexists(target / name):
                os.rename(staging / name, target / name)


def _exchange(first: Path, second: Path) -> bool:
    """Let two directories change places in one step. False where the system or the file system cannot do it."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE) == 0)


def _commit_journal(staging: Path, target: Path, removed: Collection[str]) -> None:
    """Make `staging` the journal of `target`: from the rename on, the save has happened. Then move its files."""
    for name in removed:
        if os.path.lexists(target / name):
            with open(staging / f"{_REMOVED}{name}", "xb"):
                pass
    _sync(staging)
    for attempts_left in reversed(range(10)):
        try:
            os.rename(staging, target / JOURNAL)
            break
        except OSError as error:  # another process committed in the meantime: its save comes first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not attempts_left:
                raise
            recover(target)
    _sync(target)
    with _locked(target):
        _roll_forward(target)


def _roll_forward(target: Path) -> None:
    """Move the files of a journal to their places. Can be interrupted and repeated at any point."""
    journal = target / JOURNAL
    try:
        names = sorted(os.listdir(journal))
    except FileNotFoundError:  # somebody else finished it
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if name.startswith(_REMOVED):
                os.unlink(target / name.removeprefix(_REMOVED))
            else:
                os.replace(journal / name, target / name)
    _sync(target)  # only when the files are in their places may the journal forget them
    for name in names:
        if name.startswith(_REMOVED):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(journal / name)
    with contextlib.suppress(OSError):  # gone already, or the journal of the next save by now
        os.rmdir(journal)
    _sync(target)


def _check_journal(journal: Path) -> None:
    """A journal is a real folder of regular files: a link in it could move files from elsewhere."""
    try:
        entries = [] if journal.is_symlink() else list(os.scandir(journal))
        regular = not journal.is_symlink() and all(entry.is_file(follow_symlinks=False) for entry in entries)
    except FileNotFoundError:  # rolled forward by another process just now
        return
    except NotADirectoryError:
        regular = False
    if not regular:
        raise ValueError(f"{journal} is not the journal of an interrupted save (a folder of regular files); remove it")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, so that two processes do not roll forward at once."""
    if fcntl is None:
        yield
        return
    lock = _lock(directory, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    """Bring a file or the entries of a directory to the disk."""
    if os.name == "nt" and path.is_dir():  # cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:  # a file system that cannot sync directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
