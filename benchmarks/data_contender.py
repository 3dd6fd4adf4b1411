"""One contender of data.py, in a process of its own: `python data_contender.py JOB` (JSON).

It gets ready, answers with a line of JSON, and then answers each line that it reads, a number of
seconds, with what it did in about so long. The same file runs in t5x_lite's environment and in
seqio's, which lack each other's packages, so both are imported where they are needed.
"""

import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from turns import answering

SEED = 0
EXTRA_IDS = 100  # sentinels
CHECKED_TEXTS = 100  # that both sides' vocabularies must encode alike
CACHE_SHARDS = 64  # seqio's own default
DRAIN = 0.5  # seconds at the start of a turn: what was read ahead meanwhile doesn't count


@dataclass(frozen=True)
class Job:
    """What a contender is to do."""

    contender: str
    folder: str  # of the prepared data of both sides
    vocab_size: int
    objective: str = "span_corruption"  # or causal_lm
    batch: int = 0
    length: int = 0
    targets_length: int = 0  # of span corruption: T5's for `length`
    start_step: int = 0
    warmup_epochs: float = 1.25  # tokens of so many passes are read before anything is timed
    cores: int = 0  # that the process may use; 0 for all

    @property
    def mode(self) -> str:
        return self.contender.partition("-")[2]

    @property
    def tokens(self) -> Path:
        """The training documents' ids, as t5x_lite made them: what seqio caches."""
        return Path(self.folder) / "tokens.npz"

    @property
    def texts(self) -> Path:
        """The first of the same documents."""
        return Path(self.folder) / "texts.json"

    @property
    def cache(self) -> Path:
        """seqio's cache directory."""
        return Path(self.folder) / "seqio_cache"


Turn = Callable[[float], dict]  # seconds → what was done
Batch = dict[str, np.ndarray]


# --- t5x_lite ------------------------------------------------------------------------------------


def t5x_lite_task(job: Job):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
    from t5x_lite.data.objectives import CausalLM, SpanCorruption
    from t5x_lite.data.sources import corpus
    from t5x_lite.data.tasks import Task
    from t5x_lite.data.vocabularies import SentencePiece

    kind = {"span_corruption": SpanCorruption, "causal_lm": CausalLM}[job.objective]
    vocabulary = SentencePiece(extra_ids=EXTRA_IDS, vocab_size=job.vocab_size)
    objective = kind(packing=job.mode) if job.mode in ("split", "best_fit") else kind()
    return Task("chitchat", corpus("chitchat"), vocabulary, objective, data_dir=job.folder)


def prepare_quietly(job: Job) -> None:
    """What `t5x_lite data prepare --workers 1` does."""
    from rich.console import Console

    task = t5x_lite_task(job)
    from t5x_lite.data.prepare import prepare

    prepare(task, Console(quiet=True), workers=1)


def stored_texts(job: Job, *splits: str) -> list[str]:
    from t5x_lite.data.text_store import TextStore

    task = t5x_lite_task(job)
    store = TextStore.open(task.folder, task.text_config)
    chunks = (store.chunks(split) for split in splits)
    return [record["text"] for split in chunks for chunk in split for record in chunk]


def prepare_data(job: Job) -> dict:
    """Prepares the corpus, and writes its training ids for seqio."""
    prepare_quietly(job)
    task = t5x_lite_task(job)
    store = task.store("train")
    rows = [ids for (ids,) in store.read(range(len(store)))]
    lengths = np.array([len(ids) for ids in rows])
    np.savez(job.tokens, ids=np.concatenate(rows).astype(np.int32), lengths=lengths)
    texts = stored_texts(job, "train")
    job.texts.write_text(json.dumps(texts[:CHECKED_TEXTS]))
    return {"documents": len(lengths), "tokens": int(lengths.sum())}


def t5x_lite_batches(job: Job) -> Iterator[Batch]:
    """As `t5x_lite train` reads them."""
    task = t5x_lite_task(job)
    from t5x_lite.data.pipeline import iterate

    batches = task.batches("train", batch_size=job.batch, length=job.length, seed=SEED)
    return iterate(batches, job.start_step)


def start(job: Job) -> dict:
    """The first batch of a run that begins or goes on at a step."""
    began = time.perf_counter()
    t5x_lite_task(job)
    imported = time.perf_counter()
    next(t5x_lite_batches(job))
    return {"import_seconds": imported - began, "batch_seconds": time.perf_counter() - imported}


def prepare_turns(job: Job) -> Turn:
    """The token stage on one worker: what `prepare` takes more when the tokens aren't there.

    It reads the stored text, encodes, checks, hashes and writes the ids.
    """
    size = sum(len(text.encode()) for text in stored_texts(job, "train", "validation"))

    def stage() -> np.ndarray:
        shutil.rmtree(t5x_lite_task(job).store("train").folder)
        missing = spent(lambda: prepare_quietly(job))
        return missing - spent(lambda: prepare_quietly(job))

    return functools.partial(repeated, stage, size)


def sentencepiece_turns(job: Job) -> Turn:
    """Sentencepiece's own encoder, one thread, on the same texts as Python's strings."""
    import sentencepiece

    model = t5x_lite_task(job).vocabulary_folder / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = stored_texts(job, "train", "validation")
    size = sum(len(text.encode()) for text in texts)

    def encode() -> None:
        for first in range(0, len(texts), 1024):
            processor.encode(texts[first : first + 1024], num_threads=1)

    return functools.partial(repeated, lambda: spent(encode), size)


def spent(work: Callable[[], None]) -> np.ndarray:
    """[2] seconds on the clock and of the processor."""
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


def repeated(work: Callable[[], np.ndarray], size: int, seconds: float) -> dict:
    """Does all of the work again until its own seconds are enough."""
    total, done = np.zeros(2), 0
    while total[0] < seconds:
        total, done = total + work(), done + size
    return {"seconds": total[0], "cpu_seconds": total[1], "bytes": done}


# --- seqio ---------------------------------------------------------------------------------------


def seqio_task(job: Job):
    """A task as T5's own: tokens cached offline, what depends on lengths or chance after them."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import seqio
    from t5.data import preprocessors as t5

    model = Path(job.folder) / "chitchat" / "tokenizer.model"
    vocabulary = seqio.SentencePieceVocabulary(str(model), extra_ids=EXTRA_IDS)
    # On the way to rows without padding t5 concatenates documents; to packed ones it needn't.
    steps = {
        "span_corruption": [t5.span_corruption, seqio.preprocessors.append_eos_after_trim],
        "causal_lm": [
            seqio.preprocessors.append_eos,
            functools.partial(t5.split_tokens, max_tokens_per_segment=job.length),
        ],
        "causal_lm-unpacked": [t5.full_lm],
    }
    key = job.objective
    key += "-unpacked" if f"{key}-{job.mode}" in steps else ""
    features = ["inputs", "targets"] if job.targets_length else ["targets"]
    return seqio.Task(
        "chitchat",
        # Only read where nothing is cached.
        seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: None, ["train"]),
        {name: seqio.Feature(vocabulary, add_eos=True) for name in features},
        preprocessors=[seqio.CacheDatasetPlaceholder(required=True), *steps[key]],
    )


def cache_tokens(job: Job) -> dict:
    """What seqio's `seqio_cache_tasks` (which needs apache-beam) writes: tf.Examples and counts."""
    task = seqio_task(job)
    import seqio
    import tensorflow as tf

    held = np.load(job.tokens)
    documents = np.split(held["ids"], np.cumsum(held["lengths"])[:-1])
    vocabulary = task.output_features["targets"].vocabulary
    assert vocabulary.vocab_size == job.vocab_size, vocabulary.vocab_size
    texts = json.loads(job.texts.read_text())
    for text, ids in zip(texts, documents, strict=False):
        assert vocabulary.encode(text) == ids.tolist(), "the two vocabularies differ"
    folder = job.cache / task.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prefix = seqio.utils.get_cached_tfrecord_prefix(str(folder), "train")
    for shard in range(CACHE_SHARDS):
        with tf.io.TFRecordWriter(f"{prefix}-{shard:05d}-of-{CACHE_SHARDS:05d}") as writer:
            for ids in documents[shard::CACHE_SHARDS]:
                writer.write(seqio.utils.dict_to_tfexample({"targets": ids}).SerializeToString())
    info = {"num_shards": CACHE_SHARDS, "seqio_version": seqio.__version__}
    info["features"] = {"targets": {"shape": [None], "dtype": "int32"}}
    about = {seqio.utils.get_cached_info_path: info}
    about[seqio.utils.get_cached_stats_path] = {"examples": len(documents)}
    for path, content in about.items():
        Path(path(str(folder), "train")).write_text(json.dumps(content))
    (folder / "COMPLETED").touch()
    return {"documents": len(documents), "tokens": int(held["lengths"].sum())}


def seqio_batches(job: Job) -> Iterator[Batch]:
    """As T5X's trainer reads them."""
    task = seqio_task(job)
    import seqio
    import tensorflow as tf

    seqio.add_global_cache_dirs([str(job.cache)])
    pack = job.mode != "unpacked"
    if job.targets_length:
        lengths = {"inputs": job.length, "targets": job.targets_length}
        converter = seqio.EncDecFeatureConverter(pack=pack)
    else:
        lengths, converter = {"targets": job.length}, seqio.LMFeatureConverter(pack=pack)
    rows = seqio.get_dataset(
        task, lengths, converter, use_cached=True, shuffle=True, num_epochs=None, seed=SEED
    )
    batches = rows.batch(job.batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return batches.as_numpy_iterator()


# --- both ----------------------------------------------------------------------------------------


def side_names(job: Job) -> dict[str, str]:
    """Of each side of a row, the array that is zero where there is padding."""
    if not job.contender.startswith("seqio"):
        names = {"encoder": "encoder_segments", "decoder": "segments"}
    elif job.mode == "unpacked":
        names = {"encoder": "encoder_input_tokens", "decoder": "decoder_target_tokens"}
    else:
        names = {"encoder": "encoder_segment_ids", "decoder": "decoder_segment_ids"}
    return names if job.targets_length else {"decoder": names["decoder"]}


def batch_turns(job: Job) -> tuple[Turn, dict]:
    """Warms up and gives what takes a turn, and the shape of a batch on each side."""
    batches = seqio_batches(job) if job.contender.startswith("seqio") else t5x_lite_batches(job)
    names = side_names(job)

    def count(batch: Batch) -> np.ndarray:
        return np.array([np.count_nonzero(batch[name]) for name in names.values()])

    first = next(batches)
    assert all(isinstance(array, np.ndarray) for array in first.values())
    shapes = {side: list(first[name].shape) for side, name in names.items()}
    corpus = int(np.load(job.tokens)["lengths"].sum())
    seen = count(first).sum()
    while seen < job.warmup_epochs * corpus:
        seen += count(next(batches)).sum()

    def turn(seconds: float) -> dict:
        begin = time.perf_counter()
        while time.perf_counter() < begin + min(DRAIN, seconds):
            next(batches)
        tokens, positions = np.zeros(len(names), int), 0
        begin, processor = time.perf_counter(), time.process_time()
        while time.perf_counter() < begin + seconds:
            tokens += count(next(batches))
            positions += sum(map(int, map(np.prod, shapes.values())))
        spent = time.perf_counter() - begin
        return {
            "seconds": spent,
            "cpu_seconds": time.process_time() - processor,
            "tokens": dict(zip(names, map(int, tokens), strict=True)),
            "positions": positions,
        }

    return turn, shapes


def versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in packages}


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    answer = answering()
    if job.cores:  # Linux only
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.cores])
    once = {"prepare": prepare_data, "cache": cache_tokens, "start": start}
    if job.contender in once:
        answer(**once[job.contender](job))
        return
    stages = {"tokens": prepare_turns, "sentencepiece": sentencepiece_turns}
    if job.contender in stages:
        turn = stages[job.contender](job)
        turn(0.1)
        answer(versions=versions("sentencepiece"))
    else:
        turn, shapes = batch_turns(job)
        seqio = job.contender.startswith("seqio")
        packages = ("seqio", "t5", "tensorflow-cpu") if seqio else ("grain", "array_record")
        answer(shapes=shapes, versions=versions("numpy", *packages))
    for line in sys.stdin:
        answer(**turn(float(line)))


if __name__ == "__main__":
    main()
