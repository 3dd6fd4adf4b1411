"""Source-code trees beside git, web pages beside datatrove."""

import gzip
import io
import os
import subprocess
import sys

import numpy as np
import pytest

from t5x_lite.data.sources import Checkout, Html, Warc, base, corpus
from t5x_lite.errors import UserError
from tests.data.reading import read, records, refusal

# --- source code ---------------------------------------------------------------------------------

FILES = {
    "a.py": b"import b\n",
    "src/b.py": "def é(): pass\r\n".encode(),
    "src/deep/c.c": b"int c;",
    "empty.py": b"",
    "data.bin": b"\0\1\2",
    "large.txt": b"x" * 3000,
    ".hidden": b"hidden",
    "build/made.o.txt": b"made",
}


@pytest.fixture
def tree(tmp_path):
    top = tmp_path / "tree"
    for name, content in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(content)
    os.symlink("a.py", top / "link.py")
    return top


def git(top, *command):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
    return subprocess.run(
        ["git", "-C", str(top), *settings, *command], check=True, capture_output=True
    ).stdout


@pytest.fixture
def checkout(tree):
    git(tree, "init", "-q")
    (tree / ".gitignore").write_text("build/\n")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", "one")
    (tree / "untracked.py").write_text("untracked")
    return tree


@pytest.mark.parametrize("part_bytes", [1, 30, 10**6])
def test_a_checkout_gives_its_tracked_text_files_as_git_has_them(checkout, monkeypatch, part_bytes):
    monkeypatch.setattr(base, "PART_BYTES", part_bytes)
    source = Checkout(str(checkout), max_bytes=2000)
    made = records(source)
    names = [".gitignore", ".hidden", "a.py", "empty.py", "src/b.py", "src/deep/c.c"]
    assert [record["path"] for record in made] == names
    for record in made:
        assert record["text"].encode() == git(checkout, "show", f"HEAD:{record['path']}")
        assert record["repository"] == "tree"
    assert source.left_out() == {"binary": 1, "too large": 1, "link": 1}
    assert source.name == "tree"
    for part in source.parts():
        *_, (_, place) = source.records(part, pytest.fail)
        assert place.read == part.size


def test_what_is_no_checkout_is_walked_without_hidden_folders(tree):
    (tree / ".cache").mkdir()
    (tree / ".cache" / "x.py").write_text("x")
    paths = {record["path"] for record in records(Checkout(str(tree)))}
    assert paths == set(FILES) - {"data.bin"}


def test_patterns_choose_and_several_trees_are_told_apart(checkout, tmp_path):
    python = Checkout(str(checkout), include="*.py", exclude=["src/*"])
    assert [record["path"] for record in records(python)] == ["a.py", "empty.py"]
    assert python.left_out()["excluded"] == 6
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.py").write_text("other")
    both = Checkout(str(tmp_path / "*"), include="a.py")
    assert [(record["repository"], record["text"]) for record in records(both)] == [
        ("other", "other"),
        ("tree", "import b\n"),
    ]


def test_a_folder_of_checkouts_is_known_as_such(checkout, tmp_path):
    assert corpus(str(checkout)) == Checkout([str(checkout)])
    assert corpus(str(tmp_path)) == Checkout([str(checkout)])


def test_the_stamp_of_a_tree_tells_changed_and_new_files(checkout):
    source = Checkout(str(checkout))
    before = source.stamp()
    assert source.stamp() == before
    (checkout / "a.py").write_text("import c\n")
    changed = source.stamp()
    assert changed != before
    git(checkout, "add", "untracked.py")
    assert source.stamp() not in (before, changed)


def test_a_source_file_that_is_not_utf8_is_named_or_skipped(tree):
    (tree / "src" / "b.py").write_bytes(b"# caf\xe9\n")
    source = Checkout(str(tree), include="*.py")
    assert f"{tree}/src/b.py isn't UTF-8 at byte 5 (0xe9)" in refusal(source)
    found, errors = read(Checkout(str(tree), include="*.py", broken="skip"))
    assert [record["path"] for record, _ in found] == ["a.py", "empty.py"]
    assert len(errors) == 1


def test_what_is_wrong_with_a_tree_is_said(tmp_path, checkout, monkeypatch):
    assert "no folder" in refusal(Checkout(str(tmp_path / "none")))
    with pytest.raises(UserError, match="max_bytes=0 must be at least 1"):
        Checkout("a", max_bytes=0)
    with pytest.raises(UserError, match="must name something"):
        Checkout("a", include=())
    (checkout / ".git" / "index").write_bytes(b"torn")
    assert f"git can't list {checkout}: " in refusal(Checkout(str(checkout)))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no git here; install it" in refusal(Checkout(str(checkout)))


# --- web pages -----------------------------------------------------------------------------------


def page(number, about="hills and far away", charset="utf-8"):
    paragraph = f"Über {about}, number {number}: Tom the piper's son learned to play when young. "
    return (
        f"<html><head><meta charset='{charset}'><title>Page {number}</title></head><body><nav><a "
        f"href='/'>Home</a> <a href='/more'>Menu of the site</a></nav><article><h1>Page {number}"
        f"</h1><p>{paragraph * 4}</p><p>{paragraph * 3}</p></article><footer>Imprint</footer>"
        f"</body></html>"
    ).encode(charset)


def archive(path, pages, compressed=True, kind="response"):
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    with open(path, "wb") as stream:
        writer = WARCWriter(stream, gzip=compressed)
        for number, (content, mime) in enumerate(pages):
            http = StatusAndHeaders("200 OK", [("Content-Type", mime)], protocol="HTTP/1.0")
            record = writer.create_warc_record(
                f"http://a.org/{number}",
                kind,
                payload=io.BytesIO(content),
                http_headers=http if kind == "response" else None,
                warc_headers_dict={"WARC-Identified-Payload-Type": mime} if number % 2 else None,
            )
            writer.write_record(record)
    return str(path)


PAGES = [
    (page(0), "text/html"),
    (page(1), "text/html"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "image/png"),
    (page(3, charset="iso-8859-1"), "text/html"),
    (b"<html><body></body></html>", "text/html"),
    (b"no html", "application/json"),
    (page(6), "text/html"),
]


@pytest.fixture(params=[False, True], ids=["warc", "warc.gz"])
def warc(request, tmp_path):
    name = "a.warc.gz" if request.param else "a.warc"
    return archive(tmp_path / name, PAGES, request.param)


def test_an_archive_gives_the_pages_that_datatrove_gives(warc, tmp_path):
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.readers import WarcReader

    folder, name = os.path.split(warc)
    extract = Trafilatura(deduplicate=False).extract  # without its sandbox, which forks
    documents = list(WarcReader(folder, glob_pattern=name).run())
    extracted = [(extract(d.text), d.id, d.metadata["url"]) for d in documents]
    expected = [one for one in extracted if one[0]]
    found, _ = read(Warc(warc))
    assert [(record["text"], record["id"], record["url"]) for record, _ in found] == expected
    assert [str(place) for _, place in found] == [f"{warc}, record {n}" for n in (0, 1, 3, 6)]
    for record, _ in found:
        assert "Über hills and far away" in record["text"]
        assert "Menu" not in record["text"]
    assert found[-1][1].read <= Warc(warc).parts()[0].size


def test_text_that_was_extracted_when_crawled_is_given_as_it_is(tmp_path):
    texts = [("line one\nline two é".encode(), "text/plain"), (b"<b>kept</b>", "text/plain")]
    path = archive(tmp_path / "a.warc.wet.gz", texts, kind="conversion")
    assert [record["text"] for record in records(corpus(path))] == [t.decode() for t, _ in texts]


def test_a_torn_archive_is_named_or_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Warc, "_text", lambda self, html, place: html)
    for name in ("a.warc", "a.warc.gz"):
        path = archive(tmp_path / name, PAGES[:2], name.endswith("gz"))
        with open(path, "rb") as stream:
            good = stream.read()
        whole = records(Warc(path))
        for end in range(1, len(good), 11):
            with open(path, "wb") as stream:
                stream.write(good[:end])
            found, errors = read(Warc(path, broken="skip"))
            assert [record for record, _ in found] == whole[: len(found)]
            if not errors:  # only where the file ends behind a record
                rest = good[end:].lstrip(b"\r\n")
                assert rest == b"" or rest.startswith((b"WARC/", b"\x1f\x8b"))
                continue
            (error,) = errors
            assert path in error
            assert " is torn" in error or " is no WARC archive (" in error


def test_a_long_archive_that_breaks_off_gives_what_came_before(tmp_path, monkeypatch):
    monkeypatch.setattr(Warc, "_text", lambda self, html, place: html)
    noise = np.random.default_rng(0).bytes(60_000).hex().encode()
    pages = [(b"<html>%d %b</html>" % (number, noise), "text/html") for number in range(2)]
    path = archive(tmp_path / "a.warc.gz", pages)
    size = os.path.getsize(path)
    for end in (size - 100, size - 30_000):
        os.truncate(path, end)
        found, errors = read(Warc(path, broken="skip"))
        assert [record["url"] for record, _ in found] == ["http://a.org/0"]
        assert errors[0].startswith(f"{path} is torn (Compressed file ended before")


def test_text_is_no_archive(tmp_path):
    for name, content in (("a.warc", b"text\n" * 9), ("a.warc.gz", gzip.compress(b"text\n" * 9))):
        (tmp_path / name).write_bytes(content)
        assert f"{tmp_path / name} is no WARC archive (" in refusal(Warc(str(tmp_path / name)))
    (tmp_path / "empty.warc").write_bytes(b"")
    assert records(Warc(str(tmp_path / "empty.warc"))) == []


def test_html_files_give_their_text_in_utf8_or_what_they_look_like(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_bytes(page(0))
    (tmp_path / "b.html").write_bytes(page(1, charset="iso-8859-1"))
    (tmp_path / "c.html").write_bytes(b"")
    made = records(corpus(str(tmp_path / "*.html")))
    assert [os.path.basename(record["path"]) for record in made] == ["a.html", "b.html"]
    assert all("Über hills" in record["text"] for record in made)
    import cchardet

    monkeypatch.setattr(cchardet, "detect", lambda content: {"encoding": None})
    source = Html(str(tmp_path / "*.html"))
    assert refusal(source) == f"{tmp_path}/b.html is in no encoding that is known; convert it."
    assert len(records(Html(source.paths, broken="skip"))) == 1


def test_the_text_of_a_page_does_not_depend_on_those_before(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.html").write_bytes(page(0))
    first, second = records(Html(str(tmp_path / "*.html")))
    assert first["text"] == second["text"]


@pytest.mark.parametrize("missing", ["datatrove", "warcio", "trafilatura", "cchardet"])
def test_without_what_pages_need_the_extra_is_named(warc, monkeypatch, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    for name in (missing, f"{missing}.archiveiterator", f"{missing}.pipeline"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 't5x_lite[curate]'" in refusal(Warc(warc))
