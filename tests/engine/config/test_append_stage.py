"""A stage is added to a run file's text as an entry alone, in whatever way the file is written, or not at all."""

import difflib
import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from engine.config.append_stage import appended
from engine.errors import ConfigError

STAGE = {"name": "law: new", "data": {"train": "/a b", "validation": {"x": "v"}}, "schedule": {"learning_rate": 1e-05}}
BLOCK = {
    "comments at every depth": "# head\nstages:\n  - name: one # c\n    # of one\n  # of what follows\n# tail\nz: 1\n",
    "dashes at the margin": "stages:\n- name: one\n- name: two\n\n\n# tail\nz: 1\n",
    "no line break at the end": "stages:\n- name: one",
    "line ends of Windows": "stages:\r\n- name: one\r\nz: 1\r\n",
    "a byte order mark": "\ufeffstages:\n- name: one\n",
    "text in several lines": "stages:\n- name: |\n    hello\n    you\n\nz: 1\n",
    "a quoted text in several lines": "stages:\n- name: 'a\n   b'\nz: 1\n",
    "an alias as the last value": "d: &d {train: a}\nstages:\n-   name: one\n    data:\n      *d # end\nz: 1\n",
    "a merged section": "d: &d {train: a}\nstages:\n  - <<: *d\nz: 1\n",
    "a dash on a line of its own": "stages:\n-\n   name: one\nz: 1\n",
    "an empty value at the end": "stages:\n- name: one\n  q:\nz: 1\n",
    "comments where a section is empty": "stages:\n- name: one\n  d:\n    # all default\nz: 1",
    "markers of a document": "---\nstages:\n- name: one\n...\n",
    "a key of the same name below": "x: {stages: [1]}\nstages: \n    - {name: one}\n",
    "a quoted key": "'stages':\n- name: one\n",
    "a tag": "stages: !!seq\n- name: one\n",
    "an anchor that nothing uses": "stages: &all\n- name: one\nz: 1\n",
}
FLOW = {
    "one line": "z: 1\nstages: [{name: one}]\n",
    "a comma and a comment at the end": "stages: [{name: one, }, # c\n ]\nz: 1\n",
    "brackets in comments": "stages: [\n {name: one} # first, ]\n]\n",
}
REFUSED = {
    "no list": ("stages: {a: 1}\n", "is no list"),
    "no entry": ("stages: []\n", "is empty"),
    "not here": ("include: base.yaml\n", "does not stand in this file"),
    "an alias": ("s: &s [{name: one}]\nstages: *s\n", "is an alias"),
    "an anchor that is used elsewhere": ("stages: &s\n- name: one\nz: *s\n", "cannot be added"),
    "no mapping": ("- a\n", "not sections"),
}


@pytest.mark.parametrize("kind", BLOCK)
def test_lines_are_added_and_none_is_changed(kind):
    before = BLOCK[kind]
    after = appended(before, STAGE, Path("run.yaml"))
    diff = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    assert {line[0] for line in diff} == {" ", "+"}
    assert ("\r\n" in after) == ("\r\n" in before)
    assert after.replace("\r\n", "").count("\r") == 0
    found = YAML(typ="safe", pure=True).load(after)
    assert found["stages"][-1] == STAGE
    assert appended(after, STAGE | {"name": "again"}, Path("run.yaml")).count("again") == 1, "and once more"


@pytest.mark.parametrize("kind", FLOW)
def test_an_entry_is_added_to_a_list_in_brackets(kind):
    before = FLOW[kind]
    after = appended(before, STAGE, Path("run.yaml"))
    position = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    assert after.endswith(before[position:]), "the rest of the text stands behind what was added"
    assert YAML(typ="safe", pure=True).load(after)["stages"] == [{"name": "one"}, STAGE]


def test_comments_stay_with_what_they_are_about():
    after = appended(BLOCK["comments at every depth"], STAGE, Path("run.yaml"))
    assert after.index("# of one") < after.index("law: new") < after.index("# of what follows")


def test_json_stays_json():
    after = appended('{"stages": [{"name": "one"}], "z": 1}\n', STAGE, Path("run.json"))
    assert json.loads(after) == {"stages": [{"name": "one"}, STAGE], "z": 1}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_added_to_is_refused(kind):
    text, why = REFUSED[kind]
    with pytest.raises(ConfigError, match=why) as caught:
        appended(text, STAGE, Path("run.yaml"))
    assert "by hand" in caught.value.remedy
