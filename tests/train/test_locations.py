"""Addresses of text and datasets: which values are addresses, and what may not be in one."""

from pathlib import Path
from typing import Any

import fsspec
import pytest

from slm.core.errors import SlmError
from slm.train.data.corpus import open_corpus
from slm.train.data.remote import locations
from slm.train.data.remote.locations import is_remote

END = "\n<|endoftext|>\n"


@pytest.mark.parametrize(
    "address",
    [
        "s3://KEY:SECRET@bucket/x",
        "hf://user:SECRET@datasets/x",
        "s3://bucket/x.txt?X-Amz-Signature=SECRET",
        "gs://b/x?sig=SECRET",
        "s3://KEY:SEC/SECRET@bucket/x",
        "S3://KEY:SECRET@bucket/x",
        "https://user:SECRET@example.org/x.txt",
        "gs://b/x.txt?versionId=1&access_token=SECRET",
    ],
)
def test_credentials_in_an_address_are_rejected_and_not_shown(address: str) -> None:
    with pytest.raises(SlmError, match="contains credentials") as caught:
        open_corpus([address], None)
    assert "SECRET" not in str(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("s3://bucket/x", True),
        ("hf://datasets/owner/name@main/x.parquet", True),
        ("abfs://container@account.dfs.core.windows.net/x", True),
        ("hf:owner/name", False),
        ("https://example.org/x", False),
        ("s3:bucket", False),
        ("texts/s3://x", False),
        ("C:\\texts", False),
        ("C://texts", False),
        ("s3://bucket/x.txt?versionId=1", True),
        ("s3://arn:aws:s3:us-east-1:1234:accesspoint/name/x@1", True),
    ],
)
def test_which_values_are_addresses(name: str, remote: bool) -> None:
    assert is_remote(name) is remote


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("memory:///", "memory:/// names no directory or file"),
        ("s3://", "s3:// names no directory or file"),
        ("S3://bucket/x", "S3://bucket/x is an address of an unknown kind"),
        ("https://example.org/x", "https://example.org/x is an address of an unknown kind"),
    ],
)
def test_an_address_of_nothing_is_not_a_local_directory(slm: Any, name: str, said: str) -> None:
    for arguments in (("prepare", "--data", "sample", "--out", name), ("prepare", "--data", name), ("info", name)):
        result = slm("data", *arguments)
        assert result.code == 1 and said in result.err, arguments
    assert not list(Path().iterdir())


def test_the_package_of_a_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(protocol: str) -> Any:
        raise ImportError

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    for address, package in (("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs")):
        with pytest.raises(SlmError, match=f"needs the package {package}, which is not installed") as caught:
            locations.file_system(address)
        assert caught.value.hint == f"pip install {package}"


def test_a_file_address_is_a_path(tmp_path: Path, stories: list[str]) -> None:
    (tmp_path / "x.txt").write_text(END.join(stories[:5]), encoding="utf-8")
    (source, *_) = open_corpus([f"file://{tmp_path}/x.txt"], None).sources
    assert source.name == str(tmp_path / "x.txt")
