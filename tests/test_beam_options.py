"""What stands after ``--``: options that Beam knows go to it, and others end the command before anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from bidbeam.connectors.errors import ConfigError, UsageError
from bidbeam.pipelines.beam_options import check_beam_options, pipeline_of
from bidbeam.pipelines.cli import invoke
from bidbeam.pipelines.init import write_starter


@pytest.mark.parametrize(
    ("given", "says", "nearest"),
    [
        (["--runer=DataflowRunner"], "--runer is no option of Beam's", "--runner"),
        (["--runer", "DataflowRunner"], "--runer is no option of Beam's", "--runner"),
        (["--direct_num_worker=2"], "--direct_num_worker is no option of Beam's", "--direct_num_workers"),
        (["--zzzz=1"], "--zzzz is no option of Beam's", None),
        (["--runner=FlinkRuner"], "there is no runner 'FlinkRuner'", "FlinkRunner"),
        (["--runner=FlinkRunner", "--paralelism=2"], "--paralelism is no option of Beam's", "--parallelism"),
        (["--streaming", "true"], "'true' belongs to no option", None),
        (["--direct_num_workers=two"], "invalid int value: 'two'", None),
        (["--rehearse"], "--rehearse is an option of bidbeam (expected it before the --)", None),
    ],
)
def test_what_beam_does_not_know_is_refused(given: list[str], says: str, nearest: str | None) -> None:
    """A misspelt option or runner is told with the nearest one that there is."""
    with pytest.raises(ConfigError) as caught:
        check_beam_options(given)
    assert str(caught.value).startswith("after --: ")
    assert says in str(caught.value)
    assert caught.value.nearest == nearest


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--runner=direct", "--direct_running_mode", "multi_threading"],
        ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"],
        ["--experiments=a", "--experiments=b", "--save_main_session"],
        ["--project=p", "--region", "europe-west1", "--temp_location=gs://bucket/tmp"],
        ["--runner=PortableRunner", "--job_endpoint=localhost:8099", "--its_own_setting", "7"],
    ],
)
def test_what_beam_knows_is_taken(given: list[str]) -> None:
    """Every option that Beam declares is taken, and beside a job server what only that may know."""
    check_beam_options(given)


def test_options_of_an_imported_class_are_taken() -> None:
    """Whatever subclass of PipelineOptions there is has its options taken, however deep it stands."""
    from apache_beam.options.pipeline_options import PipelineOptions

    class Ours(PipelineOptions):
        pass

    class Theirs(Ours):
        @classmethod
        def _add_argparse_args(cls, parser: object) -> None:
            parser.add_argument("--of_theirs")  # type: ignore[attr-defined]

    check_beam_options(["--of_theirs=1"])


def test_a_wrong_option_ends_the_command_before_the_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one message; there is neither output nor ledger."""
    job = write_starter(str(tmp_path))[0]
    before = sorted(tmp_path.rglob("*"))
    assert invoke(["run", job, "--rehearse", "--", "--runer=DataflowRunner"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "did you mean '--runner'?" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_options_that_do_not_go_together_are_a_mistake_of_usage() -> None:
    """What Beam finds wrong with a runner's options is told as it says it."""
    with pytest.raises(UsageError, match=r"Beam does not take these options: --runner=a\.b\.C"):
        pipeline_of(["--runner=a.b.C"])
