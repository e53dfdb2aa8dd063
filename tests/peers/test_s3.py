"""An S3 server on this machine, through s3fs: text and datasets in and out, training, and no credentials anywhere."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.recipes import small

pytestmark = pytest.mark.peer

PACKAGES = Path(__file__).parents[2] / "build" / "peers" / "s3"
SCRIPTS = Path(__file__).parent / "scripts"
KEY, SECRET = "AKIATHEKEYOFATEST", "the-secret-of-a-test"
END = "\n<|endoftext|>\n"

# Runs commands in one process: importing PyTorch takes seconds.
CODE = """
import json, sys
from slm.cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as done:
        if done.code:
            raise
"""


class Bucket:
    """A server with the bucket "bucket", and commands whose environment has its credentials."""

    def __init__(self, place: Path, port: int) -> None:
        self.place, self.port = place, port

    def run(self, *commands: list[str], code: str = CODE, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", code, json.dumps(commands)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self.place,
            env=environment(self.place) | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"} | variables,
            timeout=280,
            check=False,
        )


def environment(place: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(PACKAGES),
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "SLM_CACHE": str(place / "cache"),
    }


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory, stories: list[str]) -> Iterator[Bucket]:
    """A server with text, which is also in the directory of the commands."""
    if not PACKAGES.is_dir():
        pytest.skip("no s3fs under build/peers; `make peers` installs it")
    place = tmp_path_factory.mktemp("s3")
    (place / "texts").mkdir()
    (place / "texts/a.txt").write_text(END.join(stories[:60]), encoding="utf-8")
    (place / "texts/b.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in stories[60:90]))
    (place / "small.yaml").write_text(small(place / "texts/a.txt").to_yaml(), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(SCRIPTS / "s3_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(place),
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        made = Bucket(place, next(int(line.split()[1]) for line in server.stdout if line.startswith("port ")))
        put = "import fsspec; fsspec.filesystem('s3').put('texts/', 's3://bucket/texts/', recursive=True)"
        done = made.run(code=put)
        assert done.returncode == 0, done.stderr
        yield made


PREPARE = ["data", "prepare", "--vocab-size", "300", "--shard-tokens", "5000"]
REMOTE = ["--data", "s3://bucket/texts", "--out", "s3://bucket/made/stories"]


def test_datasets_in_s3_have_the_bytes_of_local_ones_and_are_trained_on(bucket: Bucket) -> None:
    train = ["train", "--recipe", "small.yaml", "--out"]
    done = bucket.run(
        [*PREPARE, *REMOTE],
        [*PREPARE, "--data", "texts", "--out", "local"],
        ["data", "info", "s3://bucket/made/stories", "--check"],
        [*train, "remote-run", "--data", "s3://bucket/made/stories"],
        [*train, "local-run", "--data", "local"],
    )
    assert done.returncode == 0, done.stderr
    get = "import fsspec; fsspec.filesystem('s3').get('s3://bucket/made/stories/', 'got/', recursive=True)"
    assert bucket.run(code=get).returncode == 0
    local, got = bucket.place / "local", bucket.place / "got"
    assert {file.name for file in got.iterdir()} == {file.name for file in local.iterdir()}
    for file in local.iterdir():
        if file.name == "dataset.json":
            remote, here = (json.loads(each.read_text()) for each in (got / file.name, file))
            assert [source.pop("name") for source in remote["sources"]] == [
                "s3://bucket/texts/a.txt",
                "s3://bucket/texts/b.jsonl",
            ]
            assert [source.pop("name") for source in here["sources"]] == ["texts/a.txt", "texts/b.jsonl"]
            assert remote == here
        else:
            assert (got / file.name).read_bytes() == file.read_bytes()
    weights = "checkpoint/last/model.safetensors"
    assert (bucket.place / "remote-run" / weights).read_bytes() == (bucket.place / "local-run" / weights).read_bytes()
    reference = json.loads((bucket.place / "remote-run/data/dataset.json").read_text())
    assert reference["dataset"] == "s3://bucket/made/stories"
    for file in bucket.place.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert KEY.encode() not in content and SECRET.encode() not in content, file
    assert SECRET not in done.stdout + done.stderr and KEY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("data", "variables", "said"),
    [
        ("s3://bucket/nothing", {}, "not found: s3://bucket/nothing"),
        ("s3://elsewhere/texts", {}, "not found: s3://elsewhere/texts"),
        ("s3://bucket/texts", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "cannot list s3://bucket/texts ("),
        (f"s3://{KEY}:{SECRET}@bucket/texts", {}, "contains credentials"),
        ("s3://bucket/texts", {"PYTHONPATH": ""}, "s3:// needs the package s3fs, which is not installed"),
    ],
)
def test_what_is_wrong_is_one_line_without_credentials(
    bucket: Bucket, data: str, variables: dict[str, str], said: str
) -> None:
    done = bucket.run([*PREPARE, "--data", data, "--out", "wrong"], **variables)
    assert done.returncode != 0 and said in " ".join(done.stderr.split()) and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert SECRET not in done.stdout + done.stderr and KEY not in done.stdout + done.stderr
    assert not (bucket.place / "wrong").exists()
