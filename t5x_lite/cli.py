"""The `t5x_lite` command: verbs only, no logic; and the one place that knows gin.

A verb reads gin files, applies `--gin.NAME=VALUE` on top, and calls one library function with what
they bind. Nothing heavy is imported before a verb runs, so that `--help` answers at once.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import importlib
import inspect
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin

from t5x_lite import environment
from t5x_lite.arguments import parse
from t5x_lite.errors import UserError

# --- verbs ---------------------------------------------------------------------------------------


def prepare_data(args: argparse.Namespace) -> None:
    """Text, tokenizer and tokens of a task, whichever are missing."""
    configure(args, "t5x_lite.data.prepare.prepare", task="%TASK")(**given(args, "workers"))


def show_data(args: argparse.Namespace) -> None:
    """The first rows of a task, as a model sees them."""
    run = configure(args, "t5x_lite.data.show.show", task="%TASK")
    run(**given(args, "split", "rows", "tokens", "first"))


def list_data(args: argparse.Namespace) -> None:
    """The tasks that are shipped, and what is prepared."""
    from t5x_lite.data.show import list_data

    list_data(CONFIGS, args.data_dir)


def curate_data(args: argparse.Namespace) -> None:
    """A corpus without what its rules drop, and a report of what they dropped."""
    configure(args, "t5x_lite.data.curate.curate")()


def train_tokenizer(args: argparse.Namespace) -> None:
    """The tokenizer of a task, and the text that it is trained on."""
    run = configure(args, "t5x_lite.data.prepare.train_tokenizer", task="%TASK")
    run(**given(args, "workers"))


def train(args: argparse.Namespace) -> None:
    """A training run, or with --dry_run the table of what it would train."""
    if args.dry_run:
        run = configure(args, "t5x_lite.train.describe.describe", model="%MODEL")
        run(**given(args, "devices"))
        return
    if args.model_dir is None:
        raise UserError("train needs --model_dir, where to write checkpoints and logs.")
    run = configure(args, "t5x_lite.train.loop.train")
    config_text = gin.config_str()
    options = {"model_dir": args.model_dir, "allow_data_change": args.allow_data_change}
    options |= given(args, "profile_steps", "executable")
    with among_processes(args, config_text, options) as is_first:
        try:
            run(config_text=config_text, **options)
        except (KeyboardInterrupt, SystemExit):  # stopped by the user; train has saved
            if is_first:
                write_operative_config(args.model_dir, config_text)
            raise
        if is_first:
            write_operative_config(args.model_dir, config_text)


def compile_step(args: argparse.Namespace) -> None:
    """A run's program, compiled for TPUs that aren't there, and what it would cost."""
    with contextlib.nullcontext() if args.topology == "here" else without_devices():
        run = configure(args, "t5x_lite.aot.compile.compile_step")
        if args.search:
            search_settings(args)
            return
        verb, json_file = args.program, args.json
        run(verb=verb, json_file=json_file, **given(args, "topology", "max_tokens", "save"))


def evaluate(args: argparse.Namespace) -> None:
    """Held-out loss and metrics of a checkpoint."""
    run = configure(args, "t5x_lite.evaluate.loss.evaluate")
    options = {"model_dir": args.model_dir, "baselines": args.baselines}
    options |= given(args, "step", "max_tokens")
    with among_processes(args, gin.config_str(), options):
        run(**options)


def generate(args: argparse.Namespace) -> None:
    """Continuations of prompts."""
    options = ("step", "max_tokens", "temperature", "top_k", "top_p", "num_samples", "seed")
    prompts = read_prompts(args)
    run = configure(args, "t5x_lite.serve.generate.generate")
    run(model_dir=args.model_dir, prompts=prompts, **given(args, *options))


def plot(args: argparse.Namespace) -> None:
    """The loss curves of a run as a picture."""
    from t5x_lite.train.plot import plot_loss

    print(plot_loss(args.model_dir, args.out))


def flops(args: argparse.Namespace) -> None:
    """A model's parameters, FLOPs and memory, and what training it takes."""
    with without_devices():
        target = "t5x_lite.scaling.counting.count_model"
        run = configure(args, target, model="%MODEL")
        names = ("length", "target_length", "tokens", "chip", "chips", "mfu", "json_file")
        run(**given(args, *names))


def fit(args: argparse.Namespace) -> None:
    """Scaling laws through measured points."""
    from t5x_lite.scaling import fit, points, records, report, show

    names = ("n", "d", "c", "loss", "sparsity", "unique", "accuracy", "run", "seed_column", "final")
    columns = given(args, *names)
    if not columns.keys() & {"n", "d", "c"}:
        columns = records.columns(args.points) | columns
    found = points.read(args.points, **columns, **given(args, "where", "drop_highest", "flops"))
    numbers = ("delta", "bootstraps", "seed", "target", "target_unique", "chance", "holdout")
    result = fit.fit(found, **given(args, *numbers, "force", "only", "noise"))
    show.show(result)
    print(fit.write(result, args.out))
    print(report.write(result, found, args.out))


def search_settings(args: argparse.Namespace) -> None:
    """The settings of a run, of those that fit a topology, that the model of time likes best."""
    from t5x_lite.aot import compile, search

    if args.program != "train":
        raise UserError(f"--search is for training steps, not for --verb {args.program}.")
    keys = bindings_of(compile.compile_step)
    bound = [pair for key in keys for pair in gin.config._CONFIG[key].items()]
    command = [sys.executable, "-m", "t5x_lite", "compile", "--topology", args.topology]
    command += [f"--gin_file={file}" for file in args.gin_file]
    command += [f"--gin.{override}" for override in args.overrides]
    names = ("batches", "remats", "tables", "microbatches", "workers", "worker_memory")
    run = {name: copy.deepcopy(value) for name, value in bound}
    search.search(run, command, args.topology, json_file=args.json, **given(args, *names))


def run_sweep(args: argparse.Namespace) -> None:
    """Runs that differ in a few gin values, and their losses as the points of a law."""
    with without_devices():
        from t5x_lite.scaling import facts, run, sweep, trunk

        grid = configure(args, "t5x_lite.scaling.sweep.Sweep", name="'sweep'")()
        runs = sweep.plan(grid, configure_runs(args), facts.facts, trunk.starts)
    names = ("workers", "retries", "launch", "only", "dry_run", "slurm", "held_out")
    if stopped := run.run(grid, runs, args.out, **given(args, *names)):
        sys.exit(128 + stopped)


def design_sweep(args: argparse.Namespace) -> None:
    """A grid of runs as a sweep's file, with its cost and a trial of what it would find."""
    with without_devices():
        from t5x_lite.scaling import draft

        names = [field.name for field in dataclasses.fields(draft.Options)]
        options = draft.Options(**given(args, *names))
        command = ["t5x_lite", *(sys.argv[1:] if args.argv is None else args.argv)]
        draft.draft(
            configure_runs(args), gin_files(args), args.overrides, args.out, options, command
        )


def show_sweep(args: argparse.Namespace) -> None:
    """How far a sweep is, and its rows so far."""
    from t5x_lite.scaling import run

    run.status(args.out)


@contextlib.contextmanager
def without_devices() -> Iterator[None]:
    """JAX imported here sees the CPU alone: accelerators are for processes that this one starts."""
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        del os.environ["JAX_PLATFORMS"]
        os.environ |= {} if before is None else {"JAX_PLATFORMS": before}


def configure_runs(args: argparse.Namespace) -> Callable[[list[str]], tuple[str, dict[str, Any]]]:
    """A function from NAME=VALUE lines to a run's gin text and the arguments of its `train`."""
    from t5x_lite.train.loop import train

    def configure_run(overrides: list[str]) -> tuple[str, dict[str, Any]]:
        options = vars(args) | {"overrides": [*args.overrides, *overrides]}
        configure(argparse.Namespace(**options), "t5x_lite.train.loop.train")
        read = bindings_read(train)
        for name in (override.partition("=")[0] for override in overrides):
            if not is_read(name, read):
                raise UserError(
                    f"nothing that this run uses reads {name}: an included file replaces it, or "
                    f"another part of the model is in its place."
                )
        for key in list(gin.config._CONFIG):
            if key[1].endswith("scaling.sweep.Sweep"):  # a run knows nothing of the others
                del gin.config._CONFIG[key]
        bound = [pair for key in bindings_of(train) for pair in gin.config._CONFIG[key].items()]
        return gin.config_str(), {name: copy.deepcopy(value) for name, value in bound}

    return configure_run


def convert_from_hf(args: argparse.Namespace) -> None:
    """A published model as a run's folder."""
    from t5x_lite.hub.convert import from_hf

    from_hf(args.source, args.destination, **given(args, "architecture"))


def convert_to_hf(args: argparse.Namespace) -> None:
    """A run's checkpoint as a folder that `transformers` loads."""
    run = configure(args, "t5x_lite.hub.convert.to_hf", model="%MODEL", task="%TASK")
    options = given(args, "step", "dtype", "tokenizer")
    run(model_dir=args.model_dir, destination=args.destination, **options)


@contextlib.contextmanager
def among_processes(
    args: argparse.Namespace, config_text: str, options: dict[str, Any]
) -> Iterator[bool]:
    """Joins the run's other processes, if there are any; yields whether this is the first one."""
    from t5x_lite import distributed

    place = distributed.find_place(args.coordinator, args.processes, args.process)
    given = [f"--{name} {value}" for name, value in options.items()]
    with distributed.joined(place, "\n".join([*given, config_text])):
        yield distributed.is_first()


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that the user gave; the others keep what gin or the function says."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of --prompt, then of --prompts_file; without either, the lines of a piped stdin."""
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        try:
            prompts += lines_of(Path(args.prompts_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--prompts_file {args.prompts_file}: {why}.") from error
    elif not prompts and sys.stdin is not None and not sys.stdin.isatty():
        prompts = lines_of(sys.stdin.read())
    # Nothing given: one text from its beginning.
    return prompts or [""]


def lines_of(text: str) -> list[str]:
    """Lines that aren't blank."""
    return [line for line in text.split("\n") if line.strip()]


def write_operative_config(model_dir: str, config_text: str) -> None:
    """What the run really used, defaults included, beside the config.gin that `train` wrote."""
    path, config = Path(model_dir) / "operative_config.gin", Path(model_dir) / "config.gin"
    try:
        # No such text: `train` stopped early, or found another run there or a finished one.
        if config.is_file() and config.read_text(encoding="utf-8") == config_text:
            path.write_text(gin.operative_config_str(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free or unlock it.") from error


# --- gin -----------------------------------------------------------------------------------------

# gin_configs/ stands beside the package in a checkout, and inside it in an installed wheel.
PACKAGE = Path(__file__).resolve().parent
CONFIGS = PACKAGE / "gin_configs"
if not CONFIGS.is_dir():
    CONFIGS = PACKAGE.parent / "gin_configs"

DYNAMIC = "from __gin__ import dynamic_registration"
REMEDIES = {
    "MODEL": "add --gin_file models/FAMILY/SIZE.gin",
    "TASK": "add --gin_file tasks/NAME.gin",
}
GIN_ERRORS = (
    *(ValueError, SyntaxError, NameError, AttributeError),
    *(OSError, ImportError, tokenize.TokenError),
)


def configure(args: argparse.Namespace, target: str, **fallback: str) -> Callable[..., Any]:
    """Reads the gin files and returns the function `target` with what they bind.

    `fallback` binds parameters of a function that no file names: a model file alone is enough for
    `train --dry_run`.

    Raises:
        UserError: a file, a name or a value that gin can't use, or a value that is missing.
    """
    gin.clear_config()
    # gin's second reader looks for package resources, and fails on any folder of that name.
    gin.config._FILE_READERS[:] = [(open, os.path.isfile)]
    for file in gin_files(args):
        read_gin_file(file)
    module, _, name = target.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if not bindings_of(function):
        bind_fallback(module, name, fallback)
    for override in args.overrides:
        apply_override(override)
    check_macros(function)
    check_values(function)
    return gin.get_configurable(function)


def gin_files(args: argparse.Namespace) -> list[str]:
    """The files of --gin_file; without one, the config that `train` left in the model directory."""
    if args.gin_file:
        return args.gin_file
    model_dir = getattr(args, "model_dir", None)
    if model_dir is None:
        raise UserError("no --gin_file; try --gin_file runs/quickstart.gin.")
    config = Path(model_dir) / "config.gin"
    if not config.is_file():
        raise UserError(f"no {config}, which a run writes; train there first or add --gin_file.")
    return [str(config)]


def read_gin_file(name: str) -> None:
    """Parses a file, looked for in the current folder, in gin_configs/ and in that one's parent.

    Its includes are looked for beside it first, then in the same places.
    """
    places = [Path.cwd(), CONFIGS, CONFIGS.parent]
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        shipped = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.gin"))
        hint = suggest(name.removeprefix("gin_configs/"), shipped)
        raise UserError(f"no gin file {name}, seen from this folder or from {CONFIGS}.{hint}")
    gin.config._LOCATION_PREFIXES[:] = [str(place) for place in (found.parent, *places)]
    with one_line_errors(f"gin file {name}"):
        gin.parse_config_file(str(found))


def bind_fallback(module: str, name: str, fallback: dict[str, str]) -> None:
    """Binds what a verb needs where no file does."""
    if not fallback:
        raise UserError(
            f"the gin files don't say what to {name.split('_')[0]}; start from one of "
            "gin_configs/runs, such as runs/quickstart.gin, or add --gin_file runs/verbs.gin."
        )
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    if "model" in fallback and has_value("HEADED"):  # a run's: the model with its task's head
        fallback = fallback | {"model": "%HEADED"}
    lines = [
        f"{module}.{name}.{parameter} = {value}"
        for parameter, value in fallback.items()
        # What the function can do without, and no file gives, it does without.
        if parameters[parameter].default is inspect.Parameter.empty or has_value(value[1:])
    ]
    gin.parse_config([DYNAMIC, f"import {module}", *lines])


def apply_override(text: str) -> None:
    """Binds the NAME=VALUE of `--gin.NAME=VALUE`: a macro, or a parameter such as AdamW.b1."""
    name, _, value = text.partition("=")
    if "." not in name and name not in macros_read():
        hint = suggest(name, macros_read())
        raise UserError(f"--gin.{text}: nothing in the gin files reads a macro {name}.{hint}")
    imports = [s.format() for s in gin.config.ImportManager(gin.config._IMPORTS).sorted_imports]
    statement = f"{name} = {value}"
    with one_line_errors(f"--gin.{text}", (name, value)):
        try:
            gin.parse_config([*imports, statement])
        except (NameError, AttributeError, ValueError) as unresolved:
            # Not what the files import; perhaps the short name of something that they use.
            try:
                gin.parse_config(statement)
            except ValueError as error:
                unknown = "No configurable matching" in str(error)
                raise (unresolved if unknown else error) from error


def macros_read() -> list[str]:
    """Names of the macros that some binding reads."""
    return sorted(
        {
            "/".join(r.scopes)
            for r in gin.config.iterate_references(gin.config._CONFIG)
            if r.config_key[1] == "gin.macro"
        }
    )


def check_macros(function: Callable[..., Any]) -> None:
    """Refuses a macro that `function` reads, at whatever depth, and that has no value.

    gin's own check (`finalize`) also looks at what this verb doesn't need.
    """
    for name, selector, _ in bindings_read(function):
        if selector == "gin.macro" and not has_value(name):
            remedy = REMEDIES.get(name, f"add --gin.{name}=VALUE")
            raise UserError(f"{name} has no value; {remedy}.")


def bindings_read(function: Callable[..., Any]) -> set[tuple[str, str, str]]:
    """Scope, selector and parameter of all values that `function` reads, at whatever depth.

    Macros are among them, (name, "gin.macro", "value"), those without a value too.
    """
    seen, todo = set(), [values_of(function)]
    while todo:
        for (scope, selector, parameter), value in todo.pop().items():
            if (scope, selector, parameter) in seen:
                continue
            seen.add((scope, selector, parameter))
            for reference in gin.config.iterate_references(value):
                if reference.config_key[1] == "gin.macro":
                    bound = gin.config._CONFIG.get(reference.config_key, {"value": None})
                    todo.append({(*reference.config_key, "value"): bound["value"]})
                else:
                    todo.append(values_of(reference.configurable.wrapped, reference.scopes))
    return seen


def values_of(
    function: Callable[..., Any], scopes: Sequence[str] = ()
) -> dict[tuple[str, str, str], Any]:
    """What a call of a function in scopes gets: of each parameter, the innermost scope's value."""
    inner: dict[str, tuple[str, str]] = {}
    for key in sorted(bindings_of(function, scopes), key=lambda key: len(key[0])):
        inner |= dict.fromkeys(gin.config._CONFIG[key], key)
    return {(*key, name): gin.config._CONFIG[key][name] for name, key in inner.items()}


def check_values(function: Callable[..., Any]) -> None:
    """Refuses a value of the wrong type, by building everything once before the call.

    After this, a TypeError is a bug and deserves its traceback.
    """
    parameters = inspect.signature(function).parameters
    for key in bindings_of(function):
        for name, value in gin.config._CONFIG[key].items():
            try:
                built = copy.deepcopy(value)
            except UserError:
                raise
            except (TypeError, ValueError) as error:
                raise UserError(f"{name} = {value}: {str(error).splitlines()[0]}") from error
            annotation = parameters[name].annotation if name in parameters else Any
            if not has_type(built, annotation):
                kind = getattr(annotation, "__name__", annotation)
                raise UserError(f"{name} = {value} is {built!r}, but must be of type {kind}.")


def is_read(name: str, read: Iterable[tuple[str, str, str]]) -> bool:
    """Whether a macro, or a parameter such as `llama.width`, is among the values that are read."""
    if "." not in name:
        return (name, "gin.macro", "value") in read
    scope, selector, parameter = gin.config_parser.parse_binding_key(name)
    return any(
        (s, p) == (scope, parameter) and f".{full}".endswith(f".{selector}") for s, full, p in read
    )


def has_type(value: Any, annotation: Any) -> bool:
    """False for a plain value, as gin writes them, that isn't of its parameter's plain type."""
    plain = value is None or isinstance(value, bool | int | float | str | list | tuple | dict)
    if annotation in (inspect.Parameter.empty, Any) or not plain:
        return True
    try:
        return isinstance(value, annotation)
    except TypeError:  # list[int] and the like can't be asked
        return True


def has_value(macro: str) -> bool:
    """Whether a file or an override gives it one other than %gin.REQUIRED."""
    bound = gin.config._CONFIG.get((macro, "gin.macro"))
    return bound is not None and "gin.REQUIRED" not in repr(bound["value"])


def bindings_of(function: Callable[..., Any], scopes: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Keys of what the files bind to a function, outside of scopes or inside the given ones."""
    configurable = gin.config._inverse_lookup(function)
    if configurable is None:
        return []
    inside = {"/".join(scopes[:depth]) for depth in range(len(scopes) + 1)}
    return [k for k in gin.config._CONFIG if k[0] in inside and k[1] == configurable.selector]


@contextlib.contextmanager
def one_line_errors(where: str, override: tuple[str, str] | None = None) -> Iterator[None]:
    """Turns what gin raises while it reads into one line that says where, what and a remedy."""
    try:
        yield
    except GIN_ERRORS as error:
        # gin appends the files that include each other, innermost first.
        place = re.search(r"In file \"(.*)\", (line \d+)", str(error))
        place = f" ({place[1]}, {place[2]})" if place else ""
        if isinstance(error, SyntaxError) and error.filename:
            place = f" ({error.filename}, line {error.lineno})"
        raise UserError(f"{where}: {explain(error, override)}{place}") from error


def explain(error: Exception, override: tuple[str, str] | None) -> str:
    """What is wrong, with a remedy where there is one; else the first line of gin's message."""
    message = str(error).splitlines()[0]
    if isinstance(error, SyntaxError | tokenize.TokenError):
        if override is None:
            line = getattr(error, "text", None) or message
            return f"can't read {line.strip()}; strings need quotes"
        name, value = override
        return f"that is no value; a string needs quotes: \"--gin.{name}='{value}'\""
    if match := re.match(r"Couldn't resolve .*; <module '(\S+)' .* attribute (\w+)", message):
        return f"{match[1]} has no {match[2]}.{suggest(match[2], vars(sys.modules[match[1]]))}"
    if match := re.match(r"Configurable '(\S+)' doesn't have a parameter named '(\w+)'", message):
        known = inspect.signature(gin.config._REGISTRY.get_match(match[1]).wrapped).parameters
        return f"{match[1]} has no parameter {match[2]}.{suggest(match[2], known)}"
    if match := re.match(r"'(\w+)' was not provided by an import", message):
        used = [configurable.name for configurable in gin.config._INVERSE_REGISTRY.values()]
        return f"no file imports or uses {match[1]}.{suggest(match[1], used)}"
    if match := re.match(r"Unable to open file: (.*)\. Searched", message):
        return f"it includes {match[1]}, which is neither beside it nor in {CONFIGS}"
    return message


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name nearest to a wrong one, or with all if they are few."""
    known = [option for option in known if not option.startswith("_")]
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f" Did you mean {nearest[0]}?"
    return f" There are: {', '.join(known)}." if 0 < len(known) <= 20 else ""


# --- the command ---------------------------------------------------------------------------------

VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "data prepare": prepare_data,
    "data curate": curate_data,
    "data list": list_data,
    "data show": show_data,
    "tokenizer train": train_tokenizer,
    "train": train,
    "compile": compile_step,
    "eval": evaluate,
    "generate": generate,
    "plot": plot,
    "convert from-hf": convert_from_hf,
    "convert to-hf": convert_to_hf,
    "flops": flops,
    "fit": fit,
    "sweep design": design_sweep,
    "sweep run": run_sweep,
    "sweep status": show_sweep,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        args.argv = argv
        environment.set_defaults()
        VERBS[args.verb](args)
        sys.stdout.flush()
    except UserError as error:
        # gin appends where it called what; the message is the first line.
        print(f"t5x_lite: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("t5x_lite: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who reads us has stopped, as `head` does. Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
