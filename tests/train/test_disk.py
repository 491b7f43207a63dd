"""Disks that are full or forbidden, records that are damaged, settings that no longer match: nothing is lost."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import pytest
from flax import nnx

from seqmodels.models import ModelConfig
from seqmodels.train import RunMismatch, train
from seqmodels.train.files import CannotWrite
from tests.train.quick import STEPS, Batches, checkpoints, losses, plain_loss, run
from tests.train.tiny import LOCAL, tiny_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir)
    return losses(workdir)


@contextlib.contextmanager
def files_end_at(size: int):
    """As a full disk: writes of this process beyond `size` bytes of a file fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FillingUp(Batches):
    """A disk that is full once batch number `at` is handed out."""

    def __init__(self, at: int, size: int):
        super().__init__()
        self.at, self.size, self.stack = at, size, contextlib.ExitStack()

    def __next__(self):
        if self.number + 1 == self.at:
            self.stack.enter_context(files_end_at(self.size))
        return super().__next__()


@pytest.mark.parametrize(
    ("at", "size", "said"),
    [
        (4, 0, r"the metrics of step 3 in .*/metrics.jsonl could not be written"),
        (6, 1500, r"the checkpoint of step 6 in .*/checkpoints could not be written"),
    ],
    ids=["in_a_row", "in_a_save"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:.*could not be written")
def test_a_full_disk_loses_nothing(tmp_path, whole, at, size, said):
    batches = FillingUp(at, size)
    with batches.stack, pytest.raises(CannotWrite, match=rf"{said}.*File too large.*Make room there"):
        run(tmp_path, batches)
    assert checkpoints(tmp_path) <= {"2", "4", "6.orbax-checkpoint-tmp"}
    run(tmp_path)
    assert losses(tmp_path) == whole


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl"])
def test_a_disk_that_is_full_from_the_start(tmp_path, whole, name, monkeypatch):
    with pytest.raises(ValueError, match="ended"):
        run(tmp_path, Batches(last=4))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    replace = Path.replace

    def full(path, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CannotWrite, match=rf"{tmp_path}/{name} could not be written: No space left.*Make room there"):
        run(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / name).read_bytes() == before[name]
    assert not list(tmp_path.glob("*.tmp"))
    run(tmp_path)
    assert losses(tmp_path) == whole


def test_a_folder_that_cannot_be_written_in(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CannotWrite, match=r"the run folder .* A file stands where .*: choose another workdir"):
            run(workdir)

    def forbidden(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)  # whoever runs the tests may have every right
    with pytest.raises(CannotWrite, match=r"Permission denied\. Give yourself the right to write at .*, or choose"):
        run(tmp_path / "run")


def test_a_curve_that_cannot_be_drawn_hides_no_other_error(tmp_path):
    (tmp_path / "curve.csv").mkdir()
    with pytest.warns(UserWarning, match="the curve could not be written"), pytest.raises(ValueError, match="ended"):
        run(tmp_path, Batches(last=3))


# --- damaged records


def test_a_damaged_config_is_named_and_stays(tmp_path, whole):
    run(tmp_path)
    file = tmp_path / "config.json"
    good = file.read_text()
    for content in (good[: len(good) // 2], "", "[]", "{}", '{"settings": 3}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"{file} is damaged or no record of a run \(.*move that file away"):
            run(tmp_path)
        assert file.read_text() == content
    file.unlink()  # what the message says
    run(tmp_path)
    assert losses(tmp_path) == whole
    assert file.read_text() == good


def test_damaged_launches_are_kept_aside(tmp_path):
    run(tmp_path)
    file = tmp_path / "environment.json"
    torn = file.read_text()[:100]
    file.write_text(torn)
    with pytest.warns(UserWarning, match=r"environment.json is damaged .*: kept as environment.json.damaged"):
        run(tmp_path)
    assert (tmp_path / "environment.json.damaged").read_text() == torn
    assert '"launches"' in file.read_text()


def test_damaged_metrics_are_named_unless_only_the_last_row_is_torn(tmp_path, whole):
    with pytest.raises(ValueError, match="ended"):
        run(tmp_path, Batches(last=4))
    file = tmp_path / "metrics.jsonl"
    good = file.read_bytes()
    for damage in (b"\0" * 20, b'{"loss": 1.0}', b"[1]", b"\xff"):
        lines = good.split(b"\n")
        file.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
        with pytest.raises(ValueError, match=rf"line 2 of {file} is damaged.*: remove that line or move the file away"):
            run(tmp_path)
    file.write_bytes(good + b'{"step": 5, "lo')
    run(tmp_path)
    assert losses(tmp_path) == whole


# --- settings


def test_settings_that_no_longer_match_are_listed(tmp_path):
    run(tmp_path)
    said = r"learning_rate: 0.003 -> 0.1.*: take those settings back .*, choose another folder, or remove this one"
    with pytest.raises(RunMismatch, match=rf"{tmp_path} holds a run with other settings \(train.{said}"):
        run(tmp_path, learning_rate=0.1)
    config = tiny_config(steps=STEPS, checkpoint_every=2)
    with pytest.raises(RunMismatch, match=r"other settings \(model.width: 16 -> 32"):
        train(_wider(), Batches(), config, workdir=tmp_path, loss=plain_loss, quiet=True)
    # another model under settings that do not say so, here none at all: the checkpoint does
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"/checkpoints/8 was saved by another model or .*\(257, 32\) here"):
        train(_wider(), Batches(), config, workdir=tmp_path, loss=plain_loss, quiet=True)
    assert checkpoints(tmp_path) == {"6", "8"}


def _wider():
    return ModelConfig(257, 32, (((LOCAL,), 1),), remat=False).make(rngs=nnx.Rngs(0))
