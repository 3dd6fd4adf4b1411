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
    _add_compile(verbs)
    _add_eval(verbs)
    _add_generate(verbs)
    _add_plot(verbs)
    _add_convert(verbs)
    _add_flops(verbs)
    _add_fit(verbs)
    _add_sweep(verbs)
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
    verb.add_argument(
        "--profile_steps",
        metavar="A:B",
        help="write a trace of steps A to B to DIR/profile, for XProf and ui.perfetto.dev; see "
        "docs/performance.md",
    )
    verb.add_argument(
        "--executable",
        metavar="FILE",
        help="run the step that `compile --save` stored, if it is this run's; the file is code, so "
        "name none that you wouldn't run",
    )
    _add_processes(verb)


def _add_compile(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "compile",
        "compile a run's step for TPUs, without one, and say what it would cost",
        "Prints memory, FLOPs, what chips send each other, and a modelled step time with its MFU; "
        "needs neither data nor a TPU, but the TPU's compiler: pip install 't5x_lite[tpu]'. "
        "docs/compile.md.",
        "--gin_file runs/pretrain_llama.gin --topology v5p-128",
    )
    add = verb.add_argument
    add("--topology", required=True, metavar="NAME", help="as on the cloud: v4-8, v5e-16, v5p-128, "
        "v6e-256; of several slices: 2xv5e-256")  # fmt: skip
    add(
        "--verb",
        dest="program",
        choices=("train", "eval", "generate"),
        default="train",
        help="whose program: of a step of train (default) or eval, or of what generate runs",
    )
    add("--max_tokens", type=int, metavar="N", help="of generate: the tokens that a row is given, "
        "of LENGTH in all; default: 64")  # fmt: skip
    add("--json", metavar="FILE", help="write the figures there, too")
    add("--save", metavar="FILE", help="store the training step there, for `train --executable`; "
        "--topology here is for the devices of this process")  # fmt: skip
    _add_search(verb)


def _add_search(verb: Parser) -> None:
    group = verb.add_argument_group(
        "the best settings",
        "--search tries batch × remat × rule table × microbatches, but what arithmetic rules out, "
        "and prints the fastest that fits, by the model of time, as gin overrides.",
    )
    add = group.add_argument
    add("--search", action="store_true", help="do so; the step must be train's")
    add("--batches", type=numbers, metavar="N,…", help="rows to try; default: the run's, half and "
        "twice as many")  # fmt: skip
    add("--microbatches", type=numbers, metavar="N,…", help="default: powers of two")
    add("--remats", type=names, metavar="NAME,…", help="default: all but offload")
    add("--tables", type=names, metavar="RULES:AXIS=N,…", help="default: the run's, and fsdp, "
        "fsdp_tp:tensor=2, =4, =8; more axes of one mesh: tensor=2+sequence=4")  # fmt: skip
    add("--workers", type=int, metavar="N", help="compilers at once; default: as cores and memory "
        "allow")  # fmt: skip
    add("--worker_memory", type=float, metavar="GIB", help="of this host, for a compiler at most; "
        "default: its share of what is free")  # fmt: skip


def numbers(text: str) -> list[int]:
    """Integers between commas."""
    return [int(number) for number in text.split(",")]


def names(text: str) -> list[str]:
    """Words between commas."""
    return [name.strip() for name in text.split(",")]


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


def _add_flops(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "flops",
        "count a model's parameters, FLOPs and memory",
        "Counts every product of the traced program, by part of the model, beside the conventions "
        "of scaling laws. Needs no data; a model file is enough. docs/counting.md.",
        "--gin_file models/gpt3/175b.gin --tokens 300e9 --chip v5p --chips 1024",
    )
    add = verb.add_argument
    add("--length", type=int, metavar="N", help="tokens a row; default: LENGTH, else the learned "
        "positions, else 2048")  # fmt: skip
    add("--target_length", type=int, metavar="N", help="of a decoder beside an encoder; default: "
        "the task's, else --length")  # fmt: skip
    add("--tokens", type=float, metavar="D", help="of the training; default: STEPS batches, if a "
        "run's file says")  # fmt: skip
    add("--chip", metavar="NAME", help="to train on: v4, v5e, v5p, v6e, 'NVIDIA H100', …")
    add("--chips", type=int, metavar="N", help="default: 1")
    add("--mfu", type=float, metavar="X", help="share of the chips' peak; default: 0.4")
    add("--json", dest="json_file", metavar="FILE", help="write the numbers there, too")


def _add_fit(verbs: Any) -> None:
    verb = verbs.add_parser(
        "fit",
        help="fit scaling laws to measured losses",
        description="Fits Chinchilla's, Kaplan's and other laws to runs of several sizes, by every "
        "method that the points allow, and writes all numbers to OUT/fit.json. --n, --d, --c and "
        "--loss say which column holds what, or how it follows from columns: 'tokens * 1e9', "
        "'log(ppl)'; two of N, D and C suffice, with C = 6ND, and one for Kaplan's law of it.",
        epilog="example:\n  t5x_lite fit runs.csv --n params --d tokens --out fits/runs",
    )
    add = verb.add_argument
    add("points", metavar="POINTS", help="a .csv, .tsv, .jsonl or .json file, a run in each row")
    add("--n", metavar="COL", help="parameters")
    add("--d", metavar="COL", help="training tokens")
    add("--c", metavar="COL", help="training FLOPs")
    add("--loss", metavar="COL", default="loss", help="the last loss, in nats; default: loss")
    add("--sparsity", metavar="COL", help="share of weights that are zero; N counts them too")
    add("--unique", metavar="COL", help="tokens that differ, where D counts repeated ones again")
    add("--accuracy", metavar="COL", help="on a task, between 0 and 1")
    add("--chance", type=float, metavar="X", help="accuracy of guessing; default: fitted")
    add("--run", metavar="COL", help="what rows of one training curve share; the last is its end")
    add("--seed_column", metavar="COL", help="in what runs of the same sizes differ")
    add("--final", metavar="COL", help="true in rows of runs that have ended; others are left out")
    add("--where", metavar="EXPR", help="which rows to read: \"data == 'c4' and tokens > 1e9\"")
    add("--drop_highest", type=int, default=0, metavar="K", help="leave out the K highest losses")
    flops = ("given", "6nd")
    add("--flops", choices=flops, help="where N, D and C are given, and C isn't 6ND throughout")
    add("--delta", type=float, metavar="X", help="of the Huber loss of log-losses; default: 0.001")
    add("--only", nargs="+", metavar="METHOD", help="fit these alone; default: all")
    add("--bootstraps", type=int, metavar="N", help="draws for the intervals; default: 1000")
    noise = "more intervals, by how losses err: between seeds, or about the law"
    add("--noise", choices=("seeds", "residuals"), help=noise)
    add("--holdout", type=int, metavar="K", help="largest budgets to predict from the others; "
        "default: those with a tenth of the runs; 0: none")  # fmt: skip
    add("--seed", type=int, metavar="N", help="of starts and draws; default: 0")
    add("--target", type=float, metavar="C", help="FLOPs to predict the best size and loss for")
    add("--target_unique", type=float, metavar="D", help="tokens that differ there; default: all")
    add("--force", action="store_true", help="predict, however far beyond the fitted compute")
    add("--out", required=True, metavar="DIR", help="where fit.json and the report go")
    verb.set_defaults(verb="fit")


def _add_sweep(verbs: Any) -> None:
    group = _add_group(verbs, "sweep", "design the grid of a scaling law, and run it")
    _add_sweep_design(group)
    verb = _add_verb(
        group,
        "sweep run",
        "train every run of a grid",
        "Trains the runs that a sweep's file lists, several at once, and writes their held-out "
        "losses to OUT/runs.jsonl, which `fit` reads as it is. The same command goes on after a "
        "stop, and leaves out what is finished. docs/sweeps.md.",
        "--gin_file sweeps/cpu_demo.gin --out runs/cpu_demo",
    )
    add = verb.add_argument
    add("--out", required=True, metavar="DIR", help="the sweep's folder")
    add("--workers", type=int, metavar="K", help="runs at once; default: one for each core, or one "
        "where there is an accelerator")  # fmt: skip
    add("--retries", type=int, metavar="N", help="how often a failed run is started again; "
        "default: 2")  # fmt: skip
    add("--only", metavar="NAMES", help="these runs, separated by commas; * stands for anything")
    add("--held_out", action="store_true", help="the runs that the sweep holds out: writes down "
        "what the others predict for them, then trains them")  # fmt: skip
    add("--dry_run", action="store_true", help="print sizes, compute and the command of each run, "
        "and write nothing")  # fmt: skip
    add("--slurm", action="store_true", help="write the folder and print the command that runs it "
        "as a Slurm array")  # fmt: skip
    add("--launch", metavar="COMMAND", help="start each run by this command, which gets what "
        "`train` gets: 'bash launch/tpu_vm.sh train --name pod --zone z --'; {name} is the run's "
        "name")  # fmt: skip
    verb = group.add_parser(
        "status",
        help="show how far a sweep is",
        description="Prints a table of a sweep's runs and writes its rows anew, wherever it runs.",
        epilog="example:\n  t5x_lite sweep status --out runs/cpu_demo",
    )
    verb.add_argument("--out", required=True, metavar="DIR", help="the sweep's folder")
    verb.set_defaults(verb="sweep status")


def _add_sweep_design(group: Any) -> None:
    verb = _add_verb(
        group,
        "sweep design",
        "lay out a grid, cost it, and try what it would find",
        "Writes a sweep's file for `sweep run`: sizes of one shape's rule, rates and batches by a "
        "law, and tries the grid on a known law under noise. docs/sweeps.md.",
        "--gin_file sweeps/base/decoder.gin --budgets 1e18:1e20:5 --out mine.gin",
    )
    add = verb.add_argument
    add("--out", required=True, metavar="FILE", help="the gin file to write")
    methods = ("isoflop", "kaplan", "envelope", "trunk")
    add("--method", choices=methods, help="default: isoflop")
    ranged = "LOW:HIGH:COUNT"
    add("--budgets", metavar=ranged, help="FLOPs, of isoflop")
    add("--n", metavar=ranged, help="parameters, of the other methods")
    add("--d", metavar=ranged, help="tokens, of kaplan")
    add("--sizes", type=int, metavar="K", help="of each budget; default: 7")
    add("--span", type=float, metavar="X", help="from a budget's best size to its largest and its "
        "smallest; default: 4")  # fmt: skip
    add("--choose", type=float, metavar="C", help="FLOPs in all: choose count of budgets, sizes "
        "and span by trial; --budgets then is LOW:HIGH")  # fmt: skip
    add("--horizons", type=int, metavar="K", help="of envelope and trunk: runs of a size, each "
        "twice as long as the one before; default: 4")  # fmt: skip
    add("--longest", type=float, metavar="R", help="tokens per parameter of the longest; "
        "default: 80")  # fmt: skip
    add("--tokens_per_parameter", type=float, metavar="R", help="of the best size; default: as the "
        "law says")  # fmt: skip
    add("--law", metavar="E=…,A=…", help="to try the grid on; default: Chinchilla's")
    add("--rates", metavar="LAW", help="of learning rate and batch: deepseek (default), step_law, "
        "kaplan, or one rate for all")  # fmt: skip
    add("--rate_factor", type=float, metavar="X", help="times the law's rate; default: 1")
    add("--batch_tokens", type=float, metavar="T", help="instead of the law's")
    add("--seeds", type=int, metavar="K", help="runs of each point; default: 1")
    add("--held_out", type=float, metavar="X", help="add a run of X times the largest compute, to "
        "predict")  # fmt: skip
    add("--target", type=float, metavar="X", help="times the largest compute, for which the trial "
        "predicts; default: 10")  # fmt: skip
    add("--aspect", type=float, metavar="X", help="width over layers; default: 64")
    add("--head_dim", type=int, metavar="W", help="of a head; default: 64")
    add("--noise", type=float, metavar="X", help="of the trial's log-losses; default: 0.005")
    add("--trials", type=int, metavar="N", help="draws of the trial; default: 200")
    add("--chip", metavar="NAME", help="for the hours: v5e, v5p, 'NVIDIA H100', …")
    add("--chips", type=int, metavar="N", help="default: 1")
    add("--mfu", type=float, metavar="X", help="share of the chips' peak; default: 0.4")
    add("--speed", type=float, metavar="F", help="FLOP/s in all, instead of a chip's")


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
