"""Site profiles: those that come with Palimpsest, how one is found, and what is refused."""

from pathlib import Path

import pytest

from engine.errors import ConfigError
from launcher.slurm import site


@pytest.mark.parametrize("name", site.names())
def test_every_profile_is_valid_and_names_its_source(name: str) -> None:
    profile = site.load(site.FOLDER / f"{name}.yaml")
    if name == site.NO_SITE:
        assert not profile.match
    else:
        assert profile.source.startswith("http")
        assert profile.source.endswith("(not run there)")
        assert profile.match, "found by host name"
        assert profile.gpus.per_node


def test_there_are_six_public_sites() -> None:
    assert len(site.names()) >= 6 + 1


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("uan02", "lumi-g"),
        ("login07-ext.leonardo.cineca.it", "leonardo-booster"),
        ("login05.leonardo.local", "leonardo-booster"),
        ("jwlogin22.juwels", "juwels-booster"),
        ("login12.chn.perlmutter.nersc.gov", "perlmutter"),
        ("login09.frontier.olcf.ornl.gov", "frontier"),
        ("alogin1", "marenostrum5-acc"),
        ("clariden-ln001", "clariden"),
        ("jean-zay3", "jean-zay-a100"),
        ("laptop", "generic"),
    ],
)
def test_a_site_is_found_by_the_name_of_its_login_node(host: str, name: str) -> None:
    assert site.choose(None, (host.partition(".")[0], host))[0] == name


def test_two_profiles_that_match_are_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("source: x\nmatch: ['n*']\n")
    with pytest.raises(ConfigError) as caught:
        site.choose(None, ("n1",), folder=tmp_path)
    assert (caught.value.wrong, caught.value.allowed) == ("host n1 matches several site profiles", "a, b")


def test_a_profile_of_ones_own_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("source: x\nallocation: {account: me}\n")
    name, profile = site.choose(str(path), ("laptop",), ["allocation.qos=long", "gpus.per_node=2"])
    assert (name, profile.allocation.account) == ("mine", "me")
    assert (profile.allocation.qos, profile.gpus.per_node) == ("long", 2), "the command line wins"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allocation: {acount: me}", "unknown key allocation.acount"),
        ("gpu: {per_node: 4}", "did you mean gpus?"),
        ("gpus: {per_node: many}", "gpus.per_node = 'many'"),
        ("gpus: {request: some}", "gpus.request = 'some'"),
        ("setup: {variables: {A B: x}}", "setup.variables.A B"),
        ("setup: {variables: {WANDB_API_KEY: x}}", "WANDB_API_KEY looks like a credential"),
        ("setup: {per_node: {HF_TOKEN: $(cat token)}}", "export HF_TOKEN in the shell from which you launch"),
        ("network: {address: interface}", "network.address = 'interface' without network.interface"),
    ],
)
def test_mistakes_in_a_profile(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"source: x\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        site.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_profile_that_is_not_there() -> None:
    with pytest.raises(ConfigError) as caught:
        site.choose("perlmuter", ("laptop",))
    assert "did you mean perlmutter?" in caught.value.remedy
