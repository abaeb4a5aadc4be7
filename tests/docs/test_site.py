"""The documentation builds as a site; a link or an anchor that leads nowhere would fail it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def _build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(site)],
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_site_builds_and_has_the_generated_pages(tmp_path: Path) -> None:
    done = _build(REPOSITORY / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {
        page: (tmp_path / "site" / page / "index.html").read_text() for page in ("configuration", "commands", "api")
    }
    assert "semi-relaxed" in pages["configuration"]
    assert "--epsilon" in pages["commands"]
    assert "stages.align.transport.sinkhorn.semi_relaxed" in pages["api"]
