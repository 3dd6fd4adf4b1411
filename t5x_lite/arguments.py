"""What the command line accepts, and its help. cli.py says what each verb does."""

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from t5x_lite import __version__
from t5x_lite.errors import UserError

GIN_HELP = """\
gin files are found from any folder: runs/quickstart.gin, gin_configs/runs/quickstart.gin or a path.
--gin_file repeats, and a later file wins: another model or task replaces the run's.
--gin.NAME=VALUE, repeatable too, sets a macro (--gin.STEPS=40) or a parameter of what the files
use (--gin.AdamW.weight_decay=0.1) on top; strings need quotes ("--gin.DATA_DIR='/big/data'")."""

ENVIRONMENT_HELP = """\
environment (a variable that you set yourself is left alone):
  JAX_COMPILATION_CACHE_DIR  where compiled programs are kept between runs; ~/.cache/t5x_lite/xla
  NPROC                      threads of XLA where a CPU plays several devices; 8 a device
  TPU_SKIP_MDS_QUERY, TPU_ACCELERATOR_TYPE, TPU_WORKER_HOSTNAMES
                             what libtpu asks for; without a TPU, what keeps it from asking"""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and with the epilog's own line breaks."""

    def __init__(self, description: str = "", **options: Any):
        super().__init__(
            description=textwrap.fill(description, 96),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage."""
        raise UserError(f"{message}; see {self.prog} --help.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The verb, its options, and `overrides`: NAME=VALUE of each --gin.NAME=VALUE.

    Raises:
        UserError: an unknown verb or option, or a value of the wrong type.
    """
    prefix = "--gin."
    overrides = [argument.removeprefix(prefix) for argument in argv if argument.startswith(prefix)]
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not name or not equals:
            raise UserError(f"--gin.{override}: write --gin.NAME=VALUE, without a space.")
    rest = [argument for argument in argv if not argument.startswith(prefix)]
    args = build_parser().parse_args(rest)
    args.overrides = overrides
    if overrides and not hasattr(args, "gin_file"):
        raise UserError(f"{args.verb} reads no gin files, so --gin.{overrides[0]} has no meaning.")
    return args


def build_parser() -> Parser:
    """All verbs, with their options and examples."""
    parser = Parser(
        prog="t5x_lite",
        description="Trains language models with JAX: from raw text to a model that talks.",
        epilog=f"t5x_lite VERB --help says more about a verb.\n\n{ENVIRONMENT_HELP}",
    )
    parser.add_argument("--version", action="version", version=f"t5x_lite {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_data_verbs(verbs)
    _add_train(verbs)
    _add_eval(verbs)
    _add_generate(verbs)
    _add_plot(verbs)
    _add_convert(verbs)
    _add_fit(verbs)
    return parser


def _add_data_verbs(verbs: Any) -> None:
    data = _add_group(verbs, "data", "prepare the data of a task, and look at it")
    verb = _add_verb(
        data,
        "data prepare",
        "store a task's text, tokenizer and tokens",
        "Does what is missing and says what is already there; safe to repeat, and after a kill the "
        "same command goes on. The model and the length don't matter to it, so one preparation "
        "serves many runs.",
        "--gin_file runs/quickstart.gin",
    )
    _add_workers(verb)
    _add_verb(
        data,
        "data curate",
        "clean a corpus by rules",
        "Writes what the rules keep to OUT/*.jsonl.gz, and OUT/report.md with what each of them "
        "dropped (needs the extra [curate]). The same command goes on after a kill.",
        "--gin_file curate/web.gin \"--gin.TEXT='my/*.jsonl'\" \"--gin.OUT='my/clean'\"",
    )
    _add_data_show(data)
    verb = data.add_parser(
        "list",
        help="list the tasks that are shipped, and what is prepared",
        description="Lists the task files that come with t5x_lite, and the data that is prepared.",
        epilog="example:\n  t5x_lite data list",
    )
    verb.add_argument("--data_dir", default="data", metavar="DIR", help="default: data")
    verb.set_defaults(verb="data list")
    verb = _add_verb(
        _add_group(verbs, "tokenizer", "train the tokenizer of a task"),
        "tokenizer train",
        "train a task's tokenizer on its text",
        "Stores the text first where that is missing. `data prepare` does this and tokenises too.",
        "--gin_file tasks/causal_lm.gin --gin.VOCAB_SIZE=8192",
    )
    _add_workers(verb)


def _add_data_show(data: Any) -> None:
    verb = _add_verb(
        data,
        "data show",
        "print rows of a task as a model sees them",
        "Prints pieces, ids, targets, loss weights, segments and positions: look at them before "
        "you train. The data must be prepared.",
        "--gin_file runs/pretrain_t5.gin --rows 1",
    )
    add = verb.add_argument
    add("--split", choices=("train", "validation"), help="default: train")
    add("--rows", type=int, metavar="N", help="how many; default: 2")
    add("--tokens", type=int, metavar="N", help="positions of each to print; default: 40; 0: all")
    add("--first", type=int, metavar="N", help="the row to begin with; default: 0")


def _add_workers(verb: Parser) -> None:
    verb.add_argument(
        "--workers", type=int, metavar="N", help="processes; default: one for each core"
    )


def _add_train(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "train",
        "train a model, or resume",
        "Writes checkpoints, metrics.jsonl and the configuration to the model directory; the same "
        "command again resumes exactly where it stopped, or says that it is done.",
        "--gin_file runs/quickstart.gin --model_dir runs/quickstart --gin.STEPS=40",
    )
    _add_model_dir(verb, "where to write, and to resume from", required=False)
    verb.add_argument(
        "--dry_run",
        action="store_true",
        help="print every parameter's part on a device, without allocating any, and what a device "
        "holds in all, and stop; needs no more than a model file: --gin_file "
        "models/t5_1_1/small.gin",
    )
    verb.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="of --dry_run: how many there are, for a mesh with an axis of -1; default: as many as "
        "are here",
    )
    verb.add_argument(
        "--allow_data_change",
        action="store_true",
        help="resume although the data, its order or the vocabulary changed since the checkpoint: "
        "each task goes on as far into its epoch as it was",
    )
    _add_processes(verb)


def _add_processes(verb: Parser) -> None:
    group = verb.add_argument_group(
        "several processes",
        "The same command on every host. On TPU pods, Slurm, GKE and Open MPI they find each other "
        "by themselves; elsewhere give these three, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
        "and JAX_PROCESS_ID.",
    )
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of process 0, with a port that is free there")
    add("--processes", type=int, metavar="N", help="how many; 1: alone, whatever the cluster")
    add("--process", type=int, metavar="I", help="which one this is, counted from 0")


def _add_eval(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "eval",
        "score a checkpoint on held-out text",
        "Prints nats per token and bits per byte, and the task's metrics (--gin.METRICS; "
        'docs/data.md, "Metrics"). Without --gin_file, config.gin of the model '
        "directory says what was trained on what.",
        "--model_dir runs/quickstart --baselines",
    )
    _add_model_dir(verb, "where `train` wrote")
    _add_step(verb)
    verb.add_argument(
        "--baselines",
        action="store_true",
        help="score unigram and interpolated bigram models on the same tokens too",
    )
    verb.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        help="the most tokens of an answer that metrics judge; default: as targets have",
    )
    _add_processes(verb)


def _add_generate(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "generate",
        "continue prompts with a checkpoint",
        "Prompts come from --prompt and --prompts_file, else from the lines of a piped standard "
        "input; without any, one text is sampled from its beginning.",
        "--model_dir runs/quickstart --prompt 'How are you?' --temperature 0.8",
    )
    _add_model_dir(verb, "where `train` wrote")
    _add_step(verb)
    add = verb.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    add("--prompts_file", metavar="FILE", help="one prompt a line, UTF-8")
    add("--max_tokens", type=int, metavar="N", help="the most tokens to add to a prompt")
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="0: the likeliest token; 1: as the model says",
    )
    add("--top_k", type=int, metavar="K", help="sample among the K likeliest tokens")
    add(
        "--top_p",
        type=float,
        metavar="P",
        help="sample among the likeliest that hold probability P",
    )
    add("--num_samples", type=int, metavar="N", help="continuations per prompt")
    add("--seed", type=int, metavar="N", help="of the sampling")


def _add_plot(verbs: Any) -> None:
    verb = verbs.add_parser(
        "plot",
        help="draw the loss curves of a run",
        description="Draws the training and held-out loss of a run as a picture (needs matplotlib: "
        "pip install 't5x_lite[demo]').",
        epilog="example:\n  t5x_lite plot --model_dir runs/quickstart",
    )
    _add_model_dir(verb, "where `train` wrote")
    verb.add_argument("--out", metavar="FILE", help="the picture; default: DIR/loss.png")
    verb.set_defaults(verb="plot")


def _add_fit(verbs: Any) -> None:
    verb = verbs.add_parser(
        "fit",
        help="fit scaling laws to measured losses",
        description="Fits Chinchilla's laws to runs of several sizes, by every method that the "
        "points allow, and writes all numbers to OUT/fit.json. --n, --d, --c and --loss say which "
        "column holds what; two of N, D and C suffice, with C = 6ND.",
        epilog="example:\n  t5x_lite fit runs.csv --n params --d tokens --out fits/runs",
    )
    add = verb.add_argument
    add("points", metavar="POINTS", help="a .csv, .tsv or .jsonl file, a run in each row")
    add("--n", metavar="COL", help="parameters")
    add("--d", metavar="COL", help="training tokens")
    add("--c", metavar="COL", help="training FLOPs")
    add("--loss", metavar="COL", default="loss", help="the last loss, in nats; default: loss")
    add("--sparsity", metavar="COL", help="share of weights that are zero; N counts them too")
    add("--final", metavar="COL", help="true in rows of runs that have ended; others are left out")
    add("--drop_highest", type=int, default=0, metavar="K", help="leave out the K highest losses")
    flops = ("given", "6nd")
    add("--flops", choices=flops, help="where N, D and C are given, and C isn't 6ND throughout")
    add("--delta", type=float, metavar="X", help="of the Huber loss of log-losses; default: 0.001")
    add("--bootstraps", type=int, metavar="N", help="draws for the intervals; default: 1000")
    add("--seed", type=int, metavar="N", help="of starts and draws; default: 0")
    add("--target", type=float, metavar="C", help="FLOPs to predict the best size and loss for")
    add("--force", action="store_true", help="predict, however far beyond the fitted compute")
    add("--out", required=True, metavar="DIR", help="where fit.json goes")
    verb.set_defaults(verb="fit")


def _add_convert(verbs: Any) -> None:
    group = _add_group(verbs, "convert", "published checkpoints to t5x_lite's and back")
    verb = group.add_parser(
        "from-hf",
        help="a Hugging Face model to a run's folder",
        description="Converts a Hugging Face model to the folder of a run at step 0, which "
        "`generate` and `eval` take as it is and `train` starts from (needs the extra [hub]).",
        epilog="example:\n  t5x_lite convert from-hf openai-community/gpt2 runs/gpt2",
    )
    verb.add_argument("source", metavar="SRC", help="a folder with config.json and safetensors, or "
                      "a hub name")  # fmt: skip
    verb.add_argument("destination", metavar="DST", help="a folder that doesn't exist yet")
    verb.add_argument("--architecture", metavar="CLASS", help="the class of transformers to read "
                      "it as, such as BertForPreTraining; default: config.json's")  # fmt: skip
    verb.set_defaults(verb="convert from-hf")
    verb = _add_verb(
        group,
        "convert to-hf",
        "a run's checkpoint to a folder that transformers loads",
        "Writes config.json, safetensors and the tokenizer.",
        "runs/gpt2 exported/gpt2",
    )
    verb.add_argument("model_dir", metavar="CKPT", help="where `train` or `convert` wrote")
    verb.add_argument("destination", metavar="DST", help="a folder that doesn't exist yet")
    _add_step(verb)
    verb.add_argument("--dtype", help="float32, float16 or bfloat16; default: as it was published, "
                      "or float32")  # fmt: skip
    verb.add_argument("--tokenizer", choices=("exact", "nearest"),
                      help="exact (default): one whose ids are the run's, or none; nearest: one "
                      "that may cut rows of one character differently")  # fmt: skip


def _add_verb(group: Any, name: str, what: str, more: str, example: str) -> Parser:
    verb = group.add_parser(
        name.split()[-1],
        help=what,
        description=f"{what[0].upper()}{what[1:]}. {more}",
        epilog=f"{GIN_HELP}\n\nexample:\n  t5x_lite {name} {example}",
    )
    verb.add_argument(
        "--gin_file", action="append", default=[], metavar="FILE", help="a gin file; repeatable"
    )
    verb.set_defaults(verb=name)
    return verb


def _add_group(verbs: Any, name: str, what: str) -> Any:
    group = verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    return group.add_subparsers(metavar="VERB", required=True)


def _add_model_dir(verb: Parser, note: str, required: bool = True) -> None:
    verb.add_argument("--model_dir", required=required, metavar="DIR", help=note)


def _add_step(verb: Parser) -> None:
    verb.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint of this step; default: the newest"
    )
