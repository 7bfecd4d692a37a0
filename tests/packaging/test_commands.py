"""What documents tell a reader to type is found, and run as a reader would."""

from __future__ import annotations

import subprocess

import pytest

from tests.packaging import commands, fresh

DOCUMENT = """\
```bash
echo "$VIRTUAL_ENV" > where
ls setup.py
```

<!-- mac -->
```bash
exit 1
```
<!-- published -->
```bash
exit 2
```

```python
exit(3)
```
<!-- mac -->

```bash
python -c 'import sys; assert sys.prefix != sys.base_prefix'
```

```bash
echo "$VIRTUAL_ENV" > where
ls setup.py
```
"""


@pytest.fixture
def document(monkeypatch, tmp_path):
    """The README of a clone that has nothing else but a setup.py."""
    for module in (commands, fresh):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "DOCUMENTS", ("README.md",))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "setup.py").touch()
    (tmp_path / "README.md").write_text(DOCUMENT)
    return tmp_path / "README.md"


def test_blocks_and_their_marks(document):
    found = commands.blocks("README.md")
    assert [block.mark for block in found] == ["", "mac", "published", "", ""]
    lines = document.read_text().splitlines()
    assert all(lines[block.line - 1] == block.text.splitlines()[0] for block in found)


def test_a_mark_that_is_none(document):
    document.write_text("\n\n<!-- later -->\n```bash\ntrue\n```\n")
    with pytest.raises(ValueError, match=r"README\.md:5: expected a mark of mac, published, got 'later'"):
        commands.blocks("README.md")


def test_blocks_run_in_a_fresh_environment_and_a_copy(document, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    assert commands.main([]) == 0
    text = capfd.readouterr().out
    assert text.count("setup.py\n== README.md:2: exit status 0") == 1
    assert text.index("== README.md:2: exit") < text.index("== README.md:21: exit")
    assert "2 blocks to run, 1 that stood before, skipped: 1 mac, 1 published\n" in text
    assert not (document.parent / "where").exists()


def test_blocks_run_here(document):
    assert commands.main(["--here"]) == 0
    assert (document.parent / "where").exists()


@pytest.mark.parametrize("text", ["false\ntrue", "false | true", "echo $UNSET", "exit 1"])
def test_a_command_that_fails(text, document, capfd):
    document.write_text(f"```bash\n{text}\n```\n\n```bash\necho on\n```\n")
    assert commands.main(["--here"]) == 1
    assert "\non\n" not in capfd.readouterr().out


def test_what_the_documents_have():
    found = [block.text for block in commands.all_blocks() if not block.mark]
    assert sum("pytest -n 2" in text for text in found) == 1  # CI's run of the tests


def test_a_copy_is_what_git_would_take(document):
    tree = document.parent
    (tree / ".gitignore").write_text("ignored\n")
    (tree / "ignored").touch()
    subprocess.run(["git", "add", "README.md"], cwd=tree, check=True)
    document.unlink()
    copy = fresh.copy_of_the_tree(tree.parent / "copy")
    assert {path.name for path in copy.iterdir()} == {".gitignore", "setup.py"}


def test_a_python_that_is_not_there(tmp_path):
    with pytest.raises(fresh.UnavailableError, match=r"no python3\.0 on PATH"):
        fresh.environment("3.0", tmp_path)
