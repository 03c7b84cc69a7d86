"""Every error a user can cause.

FieldmarkError            base; `code` for machines, `http_status` and `exit_status`
├── ConfigError           a key, value or combination of settings that cannot be
├── UnknownName           a recipe, model, split ... that does not exist; suggests the nearest
├── MissingDependency     an optional library is needed: the message names the extra
├── DataError             a data source that cannot be read as labelled images
├── ModelError            weights, architecture and input that do not fit each other
├── RunError              a run folder that exists, is locked, or was changed under the run
│   ├── CheckpointError   a checkpoint that is truncated, altered, or of another run
│   ├── DiskFull          no room for a file of the run; it can be resumed once there is
│   ├── Interrupted       Ctrl-C ended the run, which can be resumed (exit status 130)
│   ├── RankLost          another process of the run ended, and this one cannot go on alone
│   └── Preempted         another signal did, as of a cluster (exit status 75: resume me)
├── OutOfMemory           an update that does not fit in memory; names the batch that does
├── NonFiniteLoss         training produced NaN or infinity; names the steps
├── PackageError          a folder that is not a package, or of a newer version
│   └── IntegrityError    a file of a package does not match its checksum
├── PlaceError            a hub or file system that cannot be reached, or refuses
├── CheckFailed           a verification that ran and failed (exit status 1)
└── ImageError            bytes that are not an image we accept (HTTP 422)
    ├── ImageTooLarge     more pixels than the stated cap (HTTP 413)
    └── BodyTooLarge      more bytes than the stated cap (HTTP 413)
"""

import difflib
from collections.abc import Iterable


class FieldmarkError(Exception):
    """A mistake explained in one sentence: what must be, what was found, what to do next."""

    code = "error"
    http_status = 500
    exit_status = 2


class ConfigError(FieldmarkError):
    """A setting, or a combination of settings, that cannot be."""

    code = "bad_config"


class UnknownName(FieldmarkError):
    """A name that is not among the known ones."""

    code = "unknown_name"

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> "UnknownName":
        """Return the error for `name`, suggesting the nearest of `known`."""
        return cls(f"{kind} {name!r} does not exist.{suggestion(name, known)}")


class MissingDependency(FieldmarkError):
    """A library of an optional extra is needed and not installed."""

    code = "missing_dependency"


class DataError(FieldmarkError):
    """A data source that cannot be read as labelled images."""

    code = "bad_data"


class ModelError(FieldmarkError):
    """Weights, architecture and input that do not fit each other."""

    code = "bad_model"


class RunError(FieldmarkError):
    """A run folder that exists already, is in use, or does not fit what is asked."""

    code = "bad_run"


class CheckpointError(RunError):
    """A checkpoint that is truncated, altered, or belongs to another run."""

    code = "bad_checkpoint"


class RankLost(RunError):
    """Another process of the run ended: killed, or with an error that it told itself."""

    code = "rank_lost"
    exit_status = 1


class DiskFull(RunError):
    """There is no room for a file of the run.

    Not exit status 75: a job that is started again by itself would find the disk as full.
    """

    code = "disk_full"


class Interrupted(RunError):
    """A person stopped the run, which can be resumed."""

    code = "interrupted"
    exit_status = 130  # 128 + SIGINT, as shells have it


class Preempted(RunError):
    """A signal of the system stopped the run, which can be resumed as soon as there is a place."""

    code = "preempted"
    exit_status = 75  # EX_TEMPFAIL of sysexits.h: not a mistake, try again


class OutOfMemory(FieldmarkError):
    """An update does not fit in the memory that the process, or the device, has left."""

    code = "out_of_memory"


class NonFiniteLoss(FieldmarkError):
    """The loss or a gradient became NaN or infinite."""

    code = "non_finite_loss"
    exit_status = 1


class PackageError(FieldmarkError):
    """A folder that is not a package, or one this version cannot read."""

    code = "bad_package"


class IntegrityError(PackageError):
    """A file of a package is missing or differs from its checksum."""

    code = "integrity"
    exit_status = 1


class PlaceError(FieldmarkError):
    """A hub or file system that cannot be reached, refuses, or holds something else."""

    code = "bad_place"


class CheckFailed(FieldmarkError):
    """A check that ran to its end and failed."""

    code = "check_failed"
    exit_status = 1


class ImageError(FieldmarkError):
    """Bytes that are not an image of an accepted format, or a damaged one."""

    code = "bad_image"
    http_status = 422


class ImageTooLarge(ImageError):
    """An image with more pixels than the cap allows."""

    code = "image_too_large"
    http_status = 413


class BodyTooLarge(ImageError):
    """A request body, or a file, with more bytes than the cap allows."""

    code = "body_too_large"
    http_status = 413


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean ...?' for the nearest known name, else a list of a few, else ''."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if nearest:
        return f" Did you mean {nearest[0]!r}?"
    if not names:
        return ""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f" Known: {', '.join(names[:8])}{more}."


def require(module: str, extra: str, purpose: str) -> None:
    """Raise MissingDependency unless `module` can be imported.

    Args:
        module: the import name, for example "torch".
        extra: the extra of this package that installs it, for example "train".
        purpose: what needs it, as the start of the sentence.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise MissingDependency(
            f"{purpose} needs {module}, which is not installed. "
            f"Run: pip install 'fieldmark[{extra}]'."
        )
