"""The scripts that start runs elsewhere print the right commands, and refuse in one line."""

import pathlib
import shlex
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
TRAIN = ["--", "--gin_file", "runs/pretrain_gpt.gin", "--model_dir", "/mnt/r", "--gin.NAME='a b'"]
NODE = ["--name", "pod", "--zone", "z"]
XPK = ["--cluster", "c", "--workload", "w", "--type", "v5litepod-16", "--image", "i:1"]
SCRIPTS = ["tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch"]


def call(script, *args):
    command = ["bash", str(LAUNCH / script), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def dry(script, *args):
    """The commands that it would run, as lists of words."""
    verb = 1 if script == "tpu_vm.sh" else 0
    done = call(script, *args[:verb], "--dry_run", *args[verb:])
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def option(command, name):
    return command[command.index(name) + 1]


def test_a_pod_is_a_queued_resource():
    more = ["--type", "v5litepod-16", "--runtime", "r", "--capacity", "spot", "--project", "p"]
    (command,) = dry("tpu_vm.sh", "create", *NODE, *more)
    assert command == shlex.split(
        "gcloud compute tpus queued-resources create pod --zone z --project p "
        "--accelerator-type v5litepod-16 --runtime-version r --spot --node-id pod"
    )
    (several,) = dry("tpu_vm.sh", "create", *NODE, *more, "--slices", "2")
    assert several[-4:] == ["--node-count", "2", "--node-prefix", "pod"]


def test_the_same_command_runs_on_all_hosts_of_all_slices():
    for slices, nodes in (("1", ["pod"]), ("3", ["pod-0", "pod-1", "pod-2"])):
        commands = dry("tpu_vm.sh", "train", *NODE, "--slices", slices, *TRAIN)
        assert [command[5] for command in commands] == nodes
        for command in commands:
            assert command[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
            assert option(command, "--worker") == "all"
            remote = shlex.split(option(command, "--command"))
            assert remote[:5] == ["cd", "t5x_lite", "&&", ".venv/bin/t5x_lite", "train"]
            assert remote[5:] == TRAIN[1:]  # quotes survive two shells


def test_a_pod_is_set_up_stopped_and_given_back():
    archive, copy, install = dry("tpu_vm.sh", "setup", *NODE)
    assert archive[:2] == ["git", "archive"]
    assert option(archive, "--output") == option(copy, "scp")
    assert "make_environment .venv tpu" in option(install, "--command")
    (stop,) = dry("tpu_vm.sh", "stop", *NODE)
    assert "pkill -TERM" in option(stop, "--command")
    assert option(stop, "--worker") == "0"
    (delete,) = dry("tpu_vm.sh", "delete", *NODE)
    assert delete[3:6] == ["queued-resources", "delete", "pod"]


def test_gke_starts_a_workload_by_xpk():
    (command,) = dry("gke_xpk.sh", *XPK, "--slices", "2", "--restarts", "10", *TRAIN)
    assert command[:-1] == shlex.split(
        "xpk workload create --cluster c --workload w --tpu-type v5litepod-16 --num-slices 2 "
        "--docker-image i:1 --max-restarts 10 --command"
    )
    assert shlex.split(command[-1]) == ["t5x_lite", "train", *TRAIN[1:]]


def test_slurm_starts_one_process_a_task():
    done = call("slurm.sbatch", "--dry_run", *TRAIN)
    assert done.returncode == 0, done.stderr
    words = ["srun", "--kill-on-bad-exit=1", ".venv/bin/t5x_lite", "train", *TRAIN[1:]]
    assert shlex.split(done.stdout) == words


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script(script):
    done = call(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script}" in done.stdout
    assert "--dry_run" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("tpu_vm.sh", ["crate", *NODE], "no verb crate; there are create, status"),
        ("tpu_vm.sh", ["create", "--zone", "z"], "--name is missing"),
        ("tpu_vm.sh", ["create", *NODE], "--type is missing"),
        ("tpu_vm.sh", ["create", *NODE, "--tpye", "x"], "no option --tpye; there are --name"),
        ("tpu_vm.sh", ["create", "--name", "--zone", "z"], "--name needs a value"),
        ("tpu_vm.sh", ["train", *NODE, "--slices", "0", *TRAIN], "--slices 0 must be a whole"),
        ("tpu_vm.sh", ["train", *NODE], "nothing to train: add -- --gin_file FILE"),
        ("tpu_vm.sh", ["train", *NODE, "x"], "'x' is no option"),
        ("gke_xpk.sh", TRAIN, "--cluster is missing"),
        ("gke_xpk.sh", [*XPK, "--", "--gin_file", "a"], "--model_dir is missing after --"),
        ("slurm.sbatch", [], "nothing to train"),
        ("slurm.sbatch", ["--nodes", "2", *TRAIN], "no option --nodes"),
    ],
)
def test_bad_input_is_one_line_and_nothing_runs(script, args, message):
    done = call(script, *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
