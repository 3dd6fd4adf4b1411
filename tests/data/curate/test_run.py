"""Whole curations: what is kept, counted, found twice, resumed; on this machine and on others."""

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from t5x_lite.data import curate as rules
from t5x_lite.data.curate import Local, Slurm, curate
from t5x_lite.data.curate.run import plan
from t5x_lite.data.sources import JsonLines, base
from t5x_lite.errors import UserError

NOUNS = ["harbour", "boat", "baker", "child", "ship", "gull", "net", "wall", "town", "light"]
VERBS = ["sees", "follows", "finds", "leaves", "counts", "warms", "opens", "crosses", "paints"]


def story(seed, sentences=12):
    """A text that shares hardly an n-gram with that of another seed."""
    draw = random.Random(seed)
    lines = []
    for _ in range(sentences):
        one, two, three = draw.sample(NOUNS, 3)
        verb, other = draw.sample(VERBS, 2)
        lines.append(f"The {one} {verb} the {two} {draw.randrange(99)} and {other} a {three}.")
    return " ".join(lines)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Writes texts, or records, to so many files in turn, each of which is a part."""

    def write(texts, files=3):
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        for number in range(files):
            records = [
                one if isinstance(one, dict) else {"text": one} for one in texts[number::files]
            ]
            lines = [json.dumps(one) + "\n" for one in records]
            (folder / f"{number}.jsonl").write_text("".join(lines))
        largest = max(file.stat().st_size for file in folder.iterdir())
        monkeypatch.setattr(base, "PART_BYTES", largest)
        return JsonLines(str(folder / "*.jsonl"))

    return write


@pytest.fixture
def run(tmp_path):
    """Runs a curation quietly in this process; gives the documents kept and the report."""

    def run(source, *chosen, out="out", executor=Local(1, tasks=3), **options):  # noqa: B008
        folder = tmp_path / out
        console = Console(quiet=True)
        report = curate(source, str(folder), chosen, executor, console=console, **options)
        return kept(folder), report

    return run


def kept(folder):
    documents = []
    for file in sorted(Path(folder).glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            documents += [json.loads(line) for line in lines]
    return documents


def texts(documents):
    return sorted(one["text"] for one in documents)


def adds_up(report):
    """Nothing is lost between the rules, nor counted twice."""
    left = report["input"]
    for rule in report["rules"]:
        assert rule["read"] == left
        dropped = {name: sum(r[name] for r in rule["reasons"]) for name in ("documents", "bytes")}
        assert rule["dropped"] == dropped
        left = {
            "documents": left["documents"] - dropped["documents"],
            "bytes": left["bytes"] - dropped["bytes"] - rule["changed"]["bytes_removed"],
        }
        assert rule["kept"] == left
    assert report["kept"] == left


def test_the_numbers_add_up_and_the_documents_stay_whole(corpus, run):
    stories = [story(seed) for seed in range(20)]
    given = [
        *({"text": one, "url": f"https://{n}", "id": f"page-{n}"} for n, one in enumerate(stories)),
        *("", " \n", "too short", stories[3]),
        {"text": f"{stories[4]} Write to joe@example.net.", "rank": "../../elsewhere"},
    ]
    documents, report = run(
        corpus(given),
        rules.Length(20),
        rules.GopherQuality(tokenizer="fast"),
        rules.ExactDuplicates(),
        rules.MaskPersonalData(),
        executor=Local(1, tasks=2),  # of three parts
    )
    adds_up(report)
    assert report["input"] == {
        "documents": 25,
        "bytes": sum(len(one["text"] if isinstance(one, dict) else one) for one in given),
    }
    assert {rule["rule"]: rule["dropped"]["documents"] for rule in report["rules"]} == {
        **{"no text": 2, "Length": 1, "GopherQuality": 0},
        **{"ExactDuplicates": 1, "MaskPersonalData": 0},
    }
    assert report["rules"][-1]["changed"] == {"documents": 1, "bytes_removed": -2}
    assert report["kept"]["bytes"] == sum(len(one["text"]) for one in documents)
    by_id = {one["id"]: one for one in documents}
    assert by_id["page-7"] == {
        **{"text": stories[7], "id": "page-7", "metadata": {"url": "https://7"}}
    }
    (mail,) = (one for one in documents if "Write to" in one["text"])
    assert mail["text"].endswith("Write to email@example.com.")
    assert mail["metadata"] == {"rank": "../../elsewhere"}
    assert mail["id"].endswith("/0.jsonl:9")


def test_the_report_shows_examples(corpus, run, tmp_path):
    run(
        corpus([story(1), "tiny", "*odd* | text", story(1)]),
        rules.Length(50),
        rules.ExactDuplicates(),
    )
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Of 4 documents (" in page
    assert "| Length | 4 | 2 | 50.0% | 0 | 16 B |" in page
    assert "**too short**: 2 documents (16 B)" in page
    assert "1.jsonl:1`: tiny\n" in page
    assert "\\*odd\\* \\| text" in page
    assert "kept documents that had copies: 1" in page


def test_curated_text_can_be_curated_again(corpus, run, tmp_path):
    first, _ = run(corpus([{"text": story(n), "year": n} for n in range(4)]), rules.Length())
    again = JsonLines(str(tmp_path / "out" / "*.jsonl.gz"))
    second, _ = run(again, rules.Length(), out="again")
    assert sorted(first, key=str) == sorted(second, key=str)


# --- duplicates ----------------------------------------------------------------------------------


def test_of_exact_copies_one_stays(corpus, run):
    stories = [story(seed) for seed in range(6)]
    given = [*stories, stories[0], stories[0], stories[5], stories[1] + " "]
    documents, report = run(corpus(given), rules.ExactDuplicates())
    assert texts(documents) == sorted([*stories, stories[1] + " "])
    copies = {one["text"]: one["metadata"].get("exact_copies") for one in documents}
    assert copies[stories[0]] == 3
    assert copies[stories[5]] == 2
    assert copies[stories[1]] is None
    adds_up(report)


def edited(text, words):
    """The text with every so many'th word another."""
    parts = text.split()
    return " ".join("word" if n % words == words // 2 else part for n, part in enumerate(parts))


def test_of_near_copies_one_stays(corpus, run):
    stories = [story(seed, 40) for seed in range(8)]
    near = edited(stories[0], 150)
    given = [
        *stories,
        near,  # 5 of 100 n-grams or so are others
        edited(near, 149),  # nearer to that than to the first
        stories[1].upper().replace(".", " !"),  # case and punctuation don't count
        edited(stories[2], 4),  # shares hardly an n-gram
        "Two words",
        "two words",  # too short for an n-gram
    ]
    documents, report = run(corpus(given), rules.NearDuplicates(tokenizer="fast"))
    assert len(documents) == len(given) - 3
    found = texts(documents)
    assert len({stories[0], near, given[9]} & set(found)) == 1
    assert len({stories[1], given[10]} & set(found)) == 1
    assert {*stories[2:], given[11], "Two words", "two words"} <= set(found)
    assert sorted(one["metadata"].get("near_copies", 1) for one in documents)[-2:] == [2, 3]
    adds_up(report)
    clusters = report["rules"][-1]["clusters"]
    assert sorted(len(cluster) for cluster in clusters) == [2, 3]
    assert all(sum(one["is_kept"] for one in cluster) == 1 for cluster in clusters)


def test_near_duplicates_are_datatrove_s(corpus, run, tmp_path):
    """The same documents go as in datatrove's own pipeline over the same files."""
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline import dedup

    draw = random.Random(0)
    stories = [story(seed, 30) for seed in range(15)]
    given = stories + [
        edited(draw.choice(stories), draw.choice([9, 20, 40, 90])) for _ in range(30)
    ]
    source = corpus(given)
    documents, _ = run(source, rules.NearDuplicates())
    where, kept_there = tmp_path / "theirs", []

    def keep(data, rank, world_size):
        for document in data:
            kept_there.append(document.text)
            yield document

    def read(data, rank, world_size):
        for line in (tmp_path / "corpus" / f"{rank}.jsonl").read_text().splitlines():
            yield Document(json.loads(line)["text"], id="")

    for name, pipeline, tasks in (
        ("a", [read, dedup.MinhashDedupSignature(f"{where}/s")], 3),
        ("b", [dedup.MinhashDedupBuckets(f"{where}/s", f"{where}/b")], 14),
        ("c", [dedup.MinhashDedupCluster(f"{where}/b", f"{where}/c")], 1),
        ("d", [read, dedup.MinhashDedupFilter(f"{where}/c"), keep], 3),
    ):
        log = f"{where}/log/{name}"
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=log).run()
    assert 15 <= len(kept_there) < 40
    assert texts(documents) == sorted(kept_there)


# --- contamination -------------------------------------------------------------------------------

QUESTION = "Which of the two boats that left this old harbour before dawn came back with no fish?"


def test_thirteen_words_of_an_evaluation_set_are_found(corpus, run, tmp_path):
    words = QUESTION.rstrip("?").split()
    evaluation = tmp_path / "quiz.jsonl"
    record = {"text": "id", "choices": ["no", {"label": QUESTION}], "number": 7}
    evaluation.write_text(json.dumps(record) + "\n")
    clean, lead, end = story(1), story(2, 3), story(3, 3)
    given = [
        *(clean, f"{lead} {QUESTION} {end}"),
        f"{lead} {', '.join(words[2:15]).upper()}; {end}",  # 13 words, dressed otherwise
        f"{lead} {' '.join(words[2:14])} {end}",  # 12
    ]
    rule = rules.Decontaminate((JsonLines(str(evaluation)),))
    documents, report = run(corpus(given), rule)
    assert texts(documents) == sorted([clean, given[3]])
    (last,) = (one for one in report["rules"] if one["rule"] == "Decontaminate")
    assert last["details"] == {
        "evaluation texts": 3,
        "evaluation texts too short to look for": 2,
    }
    evidence = [one["evidence"] for one in last["reasons"][0]["examples"]]
    assert " ".join(words[2:15]).lower() in evidence
    adds_up(report)


def test_only_the_fields_that_are_named_are_looked_for(corpus, run, tmp_path):
    evaluation = tmp_path / "quiz.jsonl"
    evaluation.write_text(json.dumps({"question": QUESTION, "source": story(1)}) + "\n")
    rule = rules.Decontaminate((JsonLines(str(evaluation)),), fields=("question",))
    documents, _ = run(corpus([story(1), f"Well: {QUESTION}"]), rule)
    assert texts(documents) == [story(1)]


# --- workers and kills ---------------------------------------------------------------------------

RECIPE = (
    rules.Language(),
    rules.MaskPersonalData(),
    rules.NearDuplicates(buckets=5, tokenizer="fast"),
    rules.Length(100),
)


def test_the_number_of_workers_changes_nothing(corpus, run, tmp_path):
    stories = [story(seed, 20) for seed in range(12)]
    near = [edited(stories[seed % 3], 80 + seed) for seed in range(9)]
    source = corpus([*stories, *near, "¿Qué tal estás hoy, mi amigo?", "It is short."])
    one, report = run(source, *RECIPE, out="one")
    two, other = run(source, *RECIPE, out="two", executor=Local(2, tasks=3))
    assert one == two
    assert report == other
    pages = [(tmp_path / out / "report.md").read_bytes() for out in ("one", "two")]
    assert pages[0] == pages[1]
    assert 12 <= report["kept"]["documents"] < 18


# Scores that note what they were asked, and once, at a document of the third file, end it all.
SCORES = """
import os, pathlib, signal

def once(texts):
    here = pathlib.Path(__file__).parent
    with (here / "asked.txt").open("a") as log:
        log.writelines(text.split()[0] + "\\n" for text in texts)
    if any("FATAL" in text for text in texts) and not (here / "killed").exists():
        (here / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(texts)
"""


def fatal_corpus(corpus, tmp_path):
    (tmp_path / "deadly.py").write_text(SCORES)
    given = [f"file{n % 3}-{n} {story(n)}" for n in range(9)]
    given[5] += " FATAL"
    return corpus(given)


MAIN = """
import sys
from t5x_lite.data.sources import base
from t5x_lite.cli import main
base.PART_BYTES = int(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


class Done(NamedTuple):
    status: int
    out: str
    err: str


def shell(folder, *overrides):
    """The command in a process of its own, and in a group of processes that ends with it."""
    files = ["--gin_file", "curate/base.gin", "--gin_file", "mine.gin"]
    command = [sys.executable, "-c", MAIN, str(base.PART_BYTES), "data", "curate"]
    command += [*files, *overrides]
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=err, start_new_session=True
        )
        status = process.wait()
    with contextlib.suppress(ProcessLookupError):  # what a killed one leaves behind
        os.killpg(process.pid, signal.SIGKILL)
    return Done(status, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def test_after_a_kill_the_same_command_does_the_rest(corpus, tmp_path):
    fatal_corpus(corpus, tmp_path)
    (tmp_path / "mine.gin").write_text(
        textwrap.dedent("""\
        from __gin__ import dynamic_registration
        from t5x_lite.data import curate
        TEXT = 'corpus/*.jsonl'
        OUT = 'out'
        RULES = (@curate.Classifier(), @curate.ExactDuplicates())
        curate.Classifier.score = 'deadly:once'
        curate.Classifier.at_least = 0.5
        curate.Classifier.batch = 1
        curate.Local.workers = 1
        """)
    )
    first = shell(tmp_path)
    assert first.status == -signal.SIGKILL
    assert not list((tmp_path / "out").glob("*.jsonl.gz"))
    asked = (tmp_path / "asked.txt").read_text().split()
    order = ["file0-0", "file0-3", "file0-6", "file1-1", "file1-4", "file1-7"]
    assert asked == [*order, "file2-2", "file2-5"]
    second = shell(tmp_path)
    assert (second.status, second.err) == (0, "")
    again = (tmp_path / "asked.txt").read_text().split()[len(asked) :]
    assert again == [f"file2-{n}" for n in (2, 5, 8)]
    assert len(kept(tmp_path / "out")) == 9
    assert "kept 9 of 9 documents; out/report.md" in second.out
    assert "out/report.json is there" in shell(tmp_path).out
    assert len((tmp_path / "asked.txt").read_text().split()) == 11
    other = shell(tmp_path, "--gin.Classifier.at_least=0.6")
    assert (other.status, other.err.count("\n")) == (2, 1)
    assert "at_least 0.5 → 0.6" in other.err


def test_a_killed_worker_is_an_error_and_no_endless_wait(corpus, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = fatal_corpus(corpus, tmp_path)
    rule = rules.Classifier("deadly:once", at_least=0.5)
    with pytest.raises(UserError, match=r"a worker was killed.*Local\.workers"):
        run(source, rule, executor=Local(2, tasks=3))
    documents, _ = run(source, rule, executor=Local(2, tasks=3))
    assert len(documents) == 9


# --- bad input -----------------------------------------------------------------------------------


def test_a_broken_record_is_named_or_counted(corpus, run, tmp_path):
    corpus([story(1), story(2), story(3)])
    file = tmp_path / "corpus" / "1.jsonl"
    file.write_text('{"text": "fine and long"}\n{"text": "torn\n{"body": "no text"}\n')
    paths = str(tmp_path / "corpus" / "*.jsonl")
    with pytest.raises(UserError, match=r"1\.jsonl, line 2"):
        run(JsonLines(paths), rules.Length())
    documents, report = run(JsonLines(paths, broken="skip"), rules.Length(), out="skipped")
    assert len(documents) == report["input"]["documents"] == 3
    assert report["broken_records"]["left_out"] == 2
    first, second = report["broken_records"]["examples"]
    assert "1.jsonl, line 2" in first
    assert "has no text field 'text' (it has body)" in second
    assert "2 broken records were left out" in (tmp_path / "skipped" / "report.md").read_text()


def test_half_a_surrogate_pair_is_no_text(tmp_path, run):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "bad \\ud800 half"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2.*surrogate"):
        run(JsonLines(str(tmp_path / "a.jsonl")), rules.Length())


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ((), "name at least one rule"),
        ((rules.Length(1), rules.Length(2)), "2 rules are called 'Length'; give each a name"),
        (("Length",), "'Length' is among the rules, but is none"),
    ],
)
def test_rules_that_cannot_be_are_refused(corpus, run, chosen, message):
    with pytest.raises(UserError, match=message):
        run(corpus([story(1)]), *chosen)


def test_other_folders_are_refused(corpus, run, tmp_path):
    source = corpus([story(1), story(2), story(3)])
    with pytest.raises(UserError, match="must be a folder"):
        curate(source, "s3://bucket/out", (rules.Length(),))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.jsonl.gz").touch()
    with pytest.raises(UserError, match="holds other documents"):
        run(source, rules.Length(), out="full")
    run(source, rules.Length(), rules.ExactDuplicates())
    with pytest.raises(UserError, match="holds another curation"):  # the order counts
        run(source, rules.ExactDuplicates(), rules.Length())
    (tmp_path / "corpus" / "0.jsonl").write_text(json.dumps({"text": story(9)}) + "\n")
    with pytest.raises(UserError, match="stamp"):
        run(source, rules.Length(), rules.ExactDuplicates())


def test_a_missing_model_stops_it_before_a_document_is_read(corpus, run, tmp_path):
    with pytest.raises(UserError, match=r"none\.bin.*no such file"):
        run(corpus([story(1)]), rules.Classifier("none.bin", label="x", at_least=0.5))
    assert [place.name for place in (tmp_path / "out" / "work").iterdir() if place.is_dir()] == [
        "prepare"
    ]


def test_a_full_disk_says_where(corpus, run, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    source = corpus([story(1)])
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(source, rules.Length())


def test_without_datatrove_the_extra_is_named(corpus, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(UserError, match=r"t5x_lite\[curate\]"):
        run(corpus([story(1)]), rules.Length())


# --- other machines ------------------------------------------------------------------------------

# Stand-ins for what a Slurm job's scripts call. sbatch notes what it is given, answers with a job's
# number, and where RUN is set runs the array's jobs one after the other, with Slurm's variables.
SBATCH = """#!{python}
import os, re, subprocess, sys
from pathlib import Path
here = Path(__file__).parent
script = Path(sys.argv[-1]).read_text()
number = len(list(here.glob("job-*"))) + 1
(here / f"job-{{number:02d}}").write_text(" ".join(sys.argv[1:-1]) + "\\n" + script)
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script).groups())
for task in range(first, last + 1) if "RUN" in os.environ else ():
    variables = {{"SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": "0", "SLURM_NODELIST": "here"}}
    done = subprocess.run(["bash", "-c", script], env=os.environ | variables, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
print("Submitted batch job", number)
"""
SRUN = """#!/bin/bash
while [ "${1#-}" != "$1" ]; do
  [ "$1" = -n ] && shift
  shift
done
exec "$@"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, content in {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho here\n",
    }.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    return folder


def slurm_case(corpus):
    stories = [story(seed) for seed in range(3)]
    source = corpus([*stories, stories[0], "tiny"], 2)
    return source, (rules.Length(9), rules.ExactDuplicates())


SLURM = Slurm("cpu", "1:00:00", workers=7, tasks=2, options={"account": "mine"})


def test_slurm_gets_an_array_of_jobs_for_each_stage(corpus, run, cluster):
    source, chosen = slurm_case(corpus)
    documents, report = run(source, *chosen, executor=SLURM)
    assert (documents, report) == ([], None), "submitted only"
    jobs = [file.read_text() for file in sorted(cluster.glob("job-*"))]
    arrays = [job for job in jobs if "launch_pickled_pipeline" in job]
    names = ["preparing-the-rules", "applying-Length", "ExactDuplicates-compare"]
    names += ["applying-ExactDuplicates", "writing-the-report"]
    assert len(arrays) == len(names)
    for number, (name, job) in enumerate(zip(names, arrays, strict=True)):
        assert f"--job-name=curate-{name}" in job
        assert "--partition=cpu" in job
        assert "--account=mine" in job
        assert f"--array=0-{int('applying' in name)}%7" in job
        assert ("--dependency=afterok:" in job) == (number > 0)


@pytest.mark.grid
def test_slurm_s_jobs_do_the_same(corpus, run, cluster, monkeypatch):
    source, chosen = slurm_case(corpus)
    here, report = run(source, *chosen, out="here", executor=Local(1, tasks=2))
    monkeypatch.setenv("RUN", "1")
    documents, other = run(source, *chosen, out="there", executor=SLURM)
    assert documents == here
    assert len(documents) == 3
    assert other == report


def test_without_slurm_it_says_so(corpus, run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no sbatch here"):
        run(corpus([story(1)]), rules.Length(), executor=Slurm("cpu", "1:00:00"))


def test_ray_gets_the_same_stages(corpus, run, monkeypatch, tmp_path):
    """Not run: ray isn't installed. What it would run, and what is missing."""
    source = corpus([story(1), story(2)], 2)
    stages = plan(source, source.parts(), RECIPE, tmp_path / "out", {"tasks": 2})
    executors = [rules.Ray(workers=5, memory=3).executor(stage) for stage in stages]
    assert [one.tasks for one in executors] == [1, 2, 5, 1, 2, 1]
    assert executors[2].workers == 5
    assert executors[2].mem_per_cpu_gb == 3
    assert [list(stage.steps) for stage in stages] == [one.pipeline for one in executors]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        run(source, rules.Length(), executor=rules.Ray())
