"""Downloads from a stand-in of the hub: what is fetched, what is left where one breaks off, what is said."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import constants

from r1_cluster.weights import download as module
from r1_cluster.weights.download import BESIDE, Download, DownloadError, open_repo
from r1_cluster.weights.headers import INDEX, SINGLE
from r1_cluster.weights.hub import downloads, published

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    INDEX: b"{}",
    ONE: b"1" * 1000,
    TWO: b"2" * 2000,
    "pytorch_model.bin": b"3" * 100,
}
NAMES = [name for name in FILES if not name.endswith(".bin")]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.commit(FILES)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
        yield server


@pytest.fixture(params=["folder", "cache"])
def where(request, tmp_path):
    return tmp_path / "model" if request.param == "folder" else None


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def leftovers(download):
    return [path.name for path in download._partials.iterdir() if path.suffix in (".partial", ".link")]


def test_a_whole_download_and_another_that_finds_all_there(hub, where):
    download = Download(open_repo(hub.name, None), where)
    seen = []
    assert download.fetch(NAMES, lambda done, total: seen.append((done, total))) == 3000 + 2 + 8 + 2
    assert contents(download.folder) == {name: FILES[name] for name in NAMES}
    assert seen == sorted(seen)
    assert seen[-1] == (3012, 3012)
    assert hub.fetched() == {name: [None] for name in NAMES}
    assert leftovers(download) == []
    for name in NAMES:
        assert published(download.folder / name) == download.repo.files[name].published
    assert download.fetch(NAMES) == 0
    assert hub.fetched() == {}


def test_huggingface_hub_takes_what_was_downloaded_for_its_own(hub, where):
    download = Download(open_repo(hub.name, None), where)
    download.fetch(NAMES)
    hub.asked.clear()
    folder = huggingface_hub.snapshot_download(hub.name, local_dir=where, allow_patterns=NAMES)
    assert Path(folder) == download.folder.resolve()
    assert hub.fetched() == {}
    if where is None:
        cache = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
        assert cache.warnings == []
        (repo,) = cache.repos
        (revision,) = repo.revisions
        assert (repo.repo_id, revision.refs, revision.nb_files) == (hub.name, {"main"}, len(NAMES))


def test_what_huggingface_hub_has_downloaded_is_taken_over(hub, where):
    huggingface_hub.snapshot_download(hub.name, local_dir=where, allow_patterns=NAMES)
    hub.asked.clear()
    download = Download(open_repo(hub.name, None), where)
    assert download.fetch(NAMES) == 0
    assert hub.fetched() == {}
    assert contents(download.folder) == {name: FILES[name] for name in NAMES}


def test_files_that_lie_there_already_are_known_by_their_hash(hub, tmp_path):
    """Somebody has copied them there; one of them is another than the hub's, of the same size."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(FILES[name])
    (folder / ONE).write_bytes(b"9" * 1000)
    download = Download(open_repo(hub.name, None), folder)
    assert download.fetch(NAMES) == 1000
    assert hub.fetched() == {ONE: [None]}
    (tmp_path / "other").write_bytes(b"9" * 2000)
    os.utime(tmp_path / "other", (1, 1))
    (tmp_path / "other").rename(folder / TWO)  # an old one, put there once all were known
    assert download.fetch(NAMES) == 2000
    assert contents(folder) == {name: FILES[name] for name in NAMES}


def test_another_state_of_the_repository(hub, where):
    """A branch that moves between two downloads: what has changed is fetched, and nothing else."""
    former = open_repo(hub.name, None)
    Download(former, where).fetch(NAMES)
    hub.commit(FILES | {ONE: b"4" * 900})
    hub.asked.clear()
    later = Download(open_repo(hub.name, None), where)
    assert later.fetch(NAMES) == 900
    assert hub.fetched() == {ONE: [None]}
    assert (later.folder / ONE).read_bytes() == b"4" * 900
    pinned = Download(open_repo(hub.name, former.commit), where)
    assert pinned.fetch([ONE]) == (1000 if where is not None else 0)
    assert (pinned.folder / ONE).read_bytes() == FILES[ONE]


def test_a_snapshot_of_the_cache_may_be_named_as_a_folder(hub):
    snapshot = huggingface_hub.snapshot_download(hub.name, allow_patterns=NAMES)
    hub.asked.clear()
    assert Download(open_repo(hub.name, None), Path(snapshot)).fetch(NAMES) == 0
    assert hub.fetched() == {}
    assert all((Path(snapshot) / name).is_symlink() for name in NAMES)


@pytest.mark.parametrize("whole", [False, True], ids=["ranges", "no ranges"])
def test_a_file_goes_on_where_it_was_broken_off(hub, where, whole):
    download = Download(open_repo(hub.name, None), where)
    download._partials.mkdir(parents=True)
    partial = download._partial(TWO)
    partial.write_bytes(FILES[TWO][:700])
    hub.whole = whole
    assert download.fetch([ONE, TWO]) == 1000 + 1300
    assert hub.fetched() == {ONE: [None], TWO: ["bytes=700-"]}
    assert (download.folder / TWO).read_bytes() == FILES[TWO]
    assert leftovers(download) == []


def test_what_is_left_of_another_state_is_not_gone_on_with(hub, where):
    download = Download(open_repo(hub.name, None), where)
    download._partials.mkdir(parents=True)
    download._partial(TWO).write_bytes(FILES[TWO][:700])
    hub.commit(FILES | {TWO: b"5" * 2000})
    later = Download(open_repo(hub.name, None), where)
    hub.asked.clear()
    later.fetch([TWO])
    assert hub.fetched() == {TWO: [None]}
    assert (later.folder / TWO).read_bytes() == b"5" * 2000
    assert leftovers(later) == []


def test_what_is_left_and_longer_than_the_file_is_not_gone_on_with(hub, where):
    download = Download(open_repo(hub.name, None), where)
    download._partials.mkdir(parents=True)
    download._partial(TWO).write_bytes(b"2" * 2001)
    download.fetch([TWO])
    assert hub.fetched() == {TWO: [None]}


@pytest.mark.parametrize("left", [0, 700, 2000], ids=["all of it", "its second half", "nothing"])
def test_a_damaged_file_is_not_left_as_whole(hub, where, left):
    download = Download(open_repo(hub.name, None), where)
    download._partials.mkdir(parents=True)
    download._partial(TWO).write_bytes(b"9" * left)
    hub.damaged.add(TWO)
    with pytest.raises(DownloadError, match=rf"{TWO} came with sha256 hash .* was removed, and the same"):
        download.fetch([TWO])
    assert not (download.folder / TWO).exists()
    assert leftovers(download) == []
    hub.damaged.clear()
    assert download.fetch([TWO]) == 2000
    assert (download.folder / TWO).read_bytes() == FILES[TWO]


def test_a_damaged_small_file_too(hub, where):
    hub.damaged.add("config.json")
    download = Download(open_repo(hub.name, None), where)
    with pytest.raises(DownloadError, match=r"config.json came with git hash"):
        download.fetch(NAMES)
    assert not (download.folder / "config.json").exists()


def test_a_file_that_ends_too_early_is_kept_and_goes_on(hub, where):
    hub.short.add(TWO)
    download = Download(open_repo(hub.name, None), where)
    with pytest.raises(DownloadError, match=r"should be of size 2000 but has size 1999.*goes on from there"):
        download.fetch([ONE, TWO])
    assert not (download.folder / TWO).exists()
    hub.short.clear()
    hub.asked.clear()
    download.fetch([ONE, TWO])
    assert hub.fetched()[TWO] == ["bytes=1999-"]
    assert (download.folder / TWO).read_bytes() == FILES[TWO]


def test_connections_that_are_reset_and_a_hub_that_is_unwell_for_a_while(hub, where, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.resets[TWO], hub.unwell[ONE] = 1, 4
    download = Download(open_repo(hub.name, None), where)
    assert download.fetch([ONE, TWO]) == 3000
    assert hub.fetched() == {ONE: [None] * 5, TWO: [None, "bytes=1000-"]}
    assert {name: FILES[name] for name in (ONE, TWO)} == contents(download.folder)


def test_a_hub_that_stays_unwell_or_refuses_a_file(hub, where, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    hub.unwell[TWO] = 5
    download = Download(open_repo(hub.name, None), where)
    with pytest.raises(
        DownloadError, match="answers 503 for someone/tiny: try again later; what is finished is"
    ):
        download.fetch([TWO])
    hub.commits[download.repo.commit] = {}
    with pytest.raises(DownloadError, match="answers 404 for someone/tiny"):
        download.fetch([TWO])


def test_files_whose_names_begin_alike(hub, where):
    """What is left of the index is not taken for what is left of the file."""
    hub.commit(FILES | {SINGLE: b"6" * 50})
    download = Download(open_repo(hub.name, None), where)
    download._partials.mkdir(parents=True)
    download._partial(INDEX).write_bytes(FILES[INDEX][:1])
    hub.asked.clear()
    assert download.fetch([SINGLE, INDEX]) == 51
    assert hub.fetched() == {SINGLE: [None], INDEX: ["bytes=1-"]}


def test_a_token_is_shown_to_the_hub_and_to_nobody_else(hub, where, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(
        DownloadError, match=r"knows no repository someone/tiny, or shows it to some .*HF_TOKEN"
    ):
        open_repo(hub.name, None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.asked.clear()
    Download(open_repo(hub.name, None), where).fetch(NAMES)
    to_others = [asked.token for asked in hub.asked if asked.host.startswith("localhost")]
    assert to_others == [None, None]
    assert {asked.token for asked in hub.asked if not asked.host.startswith("localhost")} == {
        "Bearer hf_secret"
    }


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((401, "RepoNotFound"), "knows no repository someone/tiny"),
        ((404, "RepoNotFound"), "knows no repository someone/tiny"),
        ((401, "GatedRepo"), "someone/tiny is gated: ask for access at"),
        ((403, "GatedRepo"), "someone/tiny is gated: ask for access at"),
        ((403, None), r"refuses access to someone/tiny \(403\): look at HF_TOKEN"),
        ((503, None), r"answers 503 for someone/tiny: try again later|cannot be reached"),
    ],
)
def test_what_the_hub_refuses(hub, refusal, words):
    hub.refuses = refusal
    with pytest.raises(DownloadError, match=words):
        open_repo(hub.name, None)


def test_a_revision_that_is_not_there(hub):
    with pytest.raises(DownloadError, match="someone/tiny has no revision 'v9'; --revision takes a branch"):
        open_repo(hub.name, "v9")


@pytest.mark.parametrize("name", ["a/b/c", "../x", "", "a b", "x" * 200])
def test_names_that_are_none(hub, name):
    with pytest.raises(DownloadError, match="is no name of a repository; they look like"):
        open_repo(name, None)


def test_offline_and_out_of_reach(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        open_repo(hub.name, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(DownloadError, match=r"http://127.0.0.1:1 cannot be reached \(.*HF_ENDPOINT"):
        open_repo(hub.name, None)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({SINGLE: b""}, "has no config.json"),
        ({"config.json": b"{}"}, "it has no weights"),
        (
            {"config.json": b"{}", "a.bin": b""},
            "neither model.safetensors nor .*; what it has is a.bin: take",
        ),
        ({"config.json": b"{}", "other.safetensors": b""}, "what it has is other.safetensors"),
    ],
)
def test_repositories_without_what_is_needed(hub, files, words):
    hub.commit(files)
    with pytest.raises(DownloadError, match=words):
        open_repo(hub.name, None)


def test_too_little_room_is_said_before_the_first_byte(hub, where, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=2299)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    download = Download(open_repo(hub.name, None), where)
    hub.asked.clear()
    download._partials.mkdir(parents=True)
    download._partial(TWO).write_bytes(FILES[TWO][:700])
    with pytest.raises(
        DownloadError, match=r"has 0\.0 GB free, and 0\.0 GB more are needed for 2 files; make"
    ):
        download.fetch([ONE, TWO])
    assert hub.asked == []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=2300))
    assert download.fetch([ONE, TWO]) == 2300


def test_a_disk_that_fills_up_meanwhile(hub, where, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "http_get", full)
    with pytest.raises(
        DownloadError, match=r"no room left .No space left on device.: make room; what is finished"
    ):
        Download(open_repo(hub.name, None), where).fetch(NAMES)


def test_a_folder_that_is_none(hub, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="File exists"):
        Download(open_repo(hub.name, None), tmp_path / "file").fetch(NAMES)
    (tmp_path / "model" / ONE).mkdir(parents=True)
    with pytest.raises(DownloadError, match="Is a directory"):
        Download(open_repo(hub.name, None), tmp_path / "model").fetch(NAMES)


def test_two_at_a_time_in_one_place(hub, where):
    tried = []

    def progress(done, total):
        if not tried:
            tried.append(True)
            with pytest.raises(DownloadError, match="somebody else downloads someone/tiny to the same place"):
                Download(download.repo, where).fetch(NAMES)

    download = Download(open_repo(hub.name, None), where)
    download.fetch(NAMES, progress)
    assert tried
    assert contents(download.folder) == {name: FILES[name] for name in NAMES}


def test_files_in_xet_go_by_huggingface_hubs_own_way(hub, where, monkeypatch):
    """Xet itself does not run here; in its place stands what writes the bytes where it is told to."""
    asked = []

    def xet_get(*, incomplete_path, xet_file_data, headers, expected_size, displayed_filename, tqdm_class):
        assert incomplete_path.read_bytes() == b""
        asked.append((displayed_filename, xet_file_data.file_hash, expected_size))
        bar = tqdm_class(total=expected_size)
        incomplete_path.write_bytes(FILES[displayed_filename])
        bar.update(expected_size)
        bar.update_transfer(expected_size)
        bar.set_postfix_str("1 GB/s", refresh=False)
        bar.close()

    hub.in_xet.add(TWO)
    monkeypatch.setattr(module, "xet_get", xet_get)
    monkeypatch.setattr(module, "is_xet_available", lambda: True)
    download = Download(open_repo(hub.name, None), where)
    download._partials.mkdir(parents=True)
    (download._partials / f"{TWO}.{download.repo.files[TWO].published.value}.partial").write_bytes(b"22")
    seen = []
    assert download.fetch([ONE, TWO], lambda done, total: seen.append((done, total))) == 3000
    assert seen[-1] == (3000, 3000)
    assert asked == [(TWO, download.repo.files[TWO].published.value, 2000)]
    assert contents(download.folder) == {name: FILES[name] for name in (ONE, TWO)}

    def fails(**_):
        raise RuntimeError("no chunk")

    monkeypatch.setattr(module, "xet_get", fails)
    (download.folder / TWO).unlink()
    if where is None:
        (download._blobs / download.repo.files[TWO].published.value).unlink()
    with pytest.raises(DownloadError, match=r"over Xet \(no chunk\).*HF_HUB_DISABLE_XET=1 does without it"):
        download.fetch([TWO])


CHILD = """\
import sys
from pathlib import Path
from r1_cluster.weights.download import Download, open_repo
folder = Path(sys.argv[2]) if sys.argv[2] else None
Download(open_repo(sys.argv[1], None), folder).fetch(sys.argv[3:])
"""


def child(hub, where, names, cache):
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    arguments = [sys.executable, "-c", CHILD, hub.name, str(where or ""), *names]
    return subprocess.Popen(arguments, env=env, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number"),
    [("folder", signal.SIGKILL), ("cache", signal.SIGINT)],
    ids=["folder, killed", "cache, interrupted"],
    indirect=["where"],
)
def test_a_download_that_is_killed_asks_for_what_is_missing_alone(hub, where, tmp_path, number):
    """huggingface_hub writes ten MiB at a time: of the 24 MiB that came before the kill 20 are there."""
    large = os.urandom(30 << 20)
    hub.commit(FILES | {TWO: large})
    hub.stalls[TWO] = 24 << 20
    victim = child(hub, where, NAMES, tmp_path / "home")
    assert hub.stalled.wait(60)
    root = where if where is not None else tmp_path / "home"

    def partials():
        return [path for path in root.rglob(f"{TWO}.*.partial") if path.stat().st_size]

    while not partials() or partials()[0].stat().st_size < 20 << 20 or not [*root.rglob(ONE)]:
        assert victim.poll() is None
    victim.send_signal(number)
    victim.wait(30)
    assert victim.returncode in (-number, 1, 130)
    (partial,) = partials()
    assert partial.stat().st_size == 20 << 20
    assert not [*root.rglob(TWO)]
    hub.stalls.clear()
    hub.asked.clear()
    assert Download(open_repo(hub.name, None), where).fetch(NAMES) == 10 << 20
    assert hub.fetched() == {TWO: [f"bytes={20 << 20}-"]}
    (whole,) = root.rglob(TWO)
    assert whole.read_bytes() == large
    assert partials() == []


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_killed_before_any_of_its_steps_it_goes_on(hub, where, monkeypatch):
    """From one state of the repository to the next: what has a file's name is the one or the other, whole."""
    steps = ("replace", "rename", "unlink", "symlink", "fsync")
    before, after = FILES, FILES | {ONE: b"4" * 900, "config.json": b'{"b": 2}'}
    hub.commit(before)
    Download(open_repo(hub.name, None), where).fetch(NAMES)
    left, count = 0, 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*arguments, **options)

        return call

    died = True
    while died:
        count += 1
        if where is None:
            shutil.rmtree(Path(constants.HF_HUB_CACHE))
        hub.commit(before)
        Download(open_repo(hub.name, None), where).fetch(NAMES)
        hub.commit(after)
        download, died = Download(open_repo(hub.name, None), where), False
        with monkeypatch.context() as patch:
            left = count
            for name in steps:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                download.fetch(NAMES)
            except Killed:
                died = True
        found = contents(download.folder)
        assert all(data in (before[name], after[name]) for name, data in found.items())
        if found.get("config.json") == after["config.json"]:
            assert found.get(ONE) in (
                None,
                after[ONE],
            )  # never the one's weights with the other's description
        download.fetch(NAMES)
        assert contents(download.folder) == {name: after[name] for name in NAMES}
        for name in NAMES:
            assert published(download.folder / name) == download.repo.files[name].published
    assert count > 10


def test_the_metadata_of_a_folder_is_huggingface_hubs(hub, tmp_path):
    Download(open_repo(hub.name, None), tmp_path).fetch([ONE])
    commit, etag, moment = (downloads(tmp_path) / f"{ONE}.metadata").read_text().splitlines()
    assert commit == list(hub.commits)[-1]
    assert etag == open_repo(hub.name, None).files[ONE].published.value
    assert float(moment) > 1.7e9


def test_what_is_fetched_beside_weights_is_what_a_server_reads():
    assert {"config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        *BESIDE
    }
