"""Where each dataset is released: files, addresses, and the checksums that their publishers state.

A checksum stands here only where it is published and the sources that repeat it agree; None is unknown. OC20 and OC22:
the table of fairchem's documentation; QM7-X: the Zenodo record; ANI-1x and MPtrj: the figshare records.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class ReleaseFile(NamedTuple):
    """One file of a release.

    Attributes:
        name: what it is called on disk.
        url: where it is.
        size_bytes: exact; None where it is not published.
        md5: None where it is not published.
        unpacks_to: the file or folder that readers need, when it is packed.
        roughly: its size in words, where the exact one is not published.
    """

    name: str
    url: str
    size_bytes: int | None = None
    md5: str | None = None
    unpacks_to: str | None = None
    roughly: str = "size unknown"


class Release(NamedTuple):
    """One dataset as its publishers offer it; licence and citation stand with its reader.

    Attributes:
        name: of the dataset and of its reader.
        homepage: where it is described.
        files: what can be fetched.
        in_parts: the files are subsets and supersets of each other: one must say which.
    """

    name: str
    homepage: str
    files: tuple[ReleaseFile, ...]
    in_parts: bool = False


_OPEN_CATALYST = "https://dl.fbaipublicfiles.com/opencatalystproject/data"


def _qm7x(name: str, md5: str | None) -> ReleaseFile:
    url = f"https://zenodo.org/records/4288677/files/{name}.xz?download=1"
    return ReleaseFile(f"{name}.xz", url, md5=md5, unpacks_to=f"{name}.hdf5")


def _oc20(part: str, md5: str, roughly: str) -> ReleaseFile:
    name = f"s2ef_{part}"
    return ReleaseFile(f"{name}.tar", f"{_OPEN_CATALYST}/{name}.tar", md5=md5, unpacks_to=name, roughly=roughly)


def _oc22(name: str, md5: str, roughly: str) -> ReleaseFile:
    url = f"{_OPEN_CATALYST}/oc22/{name}.tar.gz"
    return ReleaseFile(f"{name}.tar.gz", url, md5=md5, unpacks_to=name, roughly=roughly)


_ALL = (
    Release(
        "ani1x",
        "https://springernature.figshare.com/articles/dataset/ANI-1x_Dataset_Release/10047041",
        (
            ReleaseFile(
                "ani1x-release.h5",
                "https://springernature.figshare.com/ndownloader/files/18112775",
                size_bytes=5_590_846_027,
                md5="98090dd6679106da861f52bed825ffb7",
            ),
        ),
    ),
    Release(
        "qm7x",
        "https://zenodo.org/records/4288677",
        (
            _qm7x("1000", "b50c6a5d0a4493c274368cf22285503e"),
            _qm7x("2000", "4418a813daf5e0d44aa5a26544249ee6"),
            _qm7x("3000", "f7b5aac39a745f11436047c12d1eb24e"),
            _qm7x("4000", "26819601705ef8c14080fa7fc69decd4"),
            _qm7x("5000", "85ac444596b87812aaa9e48d203d0b70"),
            _qm7x("6000", None),  # two digits differ between those who repeat the record's checksum
            _qm7x("7000", "5ecce00a188410d06b747cb683d8d347"),
            _qm7x("8000", "c893ae88b8f5c32541c3f024fc1daa45"),
        ),
    ),
    Release(
        "oc20",
        "https://fair-chem.github.io/catalysts/datasets/oc20.html",
        (
            _oc20("train_200K", "f8d0909c2623a393148435dede7d3a46", "344 MB"),
            _oc20("train_2M", "953474cb93f0b08cdc523399f03f7c36", "3.4 GB"),
            _oc20("train_20M", "863bc983245ffc0285305a1850e19cf7", "34 GB"),
            _oc20("train_all", "12a7087bfd189a06ccbec9bc7add2bcd", "225 GB"),
            _oc20("val_id", "f57f7f5c1302637940f2cc858e789410", "1.7 GB"),
            _oc20("val_ood_ads", "431ab0d7557a4639605ba8b67793f053", "1.7 GB"),
            _oc20("val_ood_cat", "532d6cd1fe541a0ddb0aa0f99962b7db", "1.7 GB"),
            _oc20("val_ood_both", "5731862978d80502bbf7017d68c2c729", "1.9 GB"),
            _oc20("rattled", "40431149b27b64ce1fb40cac4e2e064b", "29 GB"),
            _oc20("md", "9fed845aaab8fb4bf85e3a8db57796e0", "42 GB"),
        ),
        in_parts=True,
    ),
    Release(
        "oc22",
        "https://fair-chem.github.io/catalysts/datasets/oc22.html",
        (
            _oc22("s2ef_total_train_val_test_lmdbs", "ebea523c6f8d61248a37b4dd660b11e6", "20 GB"),
            _oc22("oc22_trajectories", "977b6be1cbac6864e63c4c7fbf8a3fce", "34 GB"),
        ),
        in_parts=True,
    ),
    Release(
        "mptrj",
        "https://figshare.com/articles/dataset/23713842",
        (
            ReleaseFile(
                "MPtrj_2022.9_full.json",
                "https://figshare.com/ndownloader/files/41619375",
                size_bytes=12_188_168_685,
                md5="50ead5f27f9a4f6beb7564c4188f1e9f",
            ),
        ),
    ),
)

RELEASES: Mapping[str, Release] = MappingProxyType({release.name: release for release in _ALL})
