"""A real browser for tests of pages, and what a person would call broken on one.

Tests skip, and say why, where playwright or a browser is missing.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_BROWSERS = ("chromium", "google-chrome", "chromium-browser", "google-chrome-stable")

# What a person would call broken, as a list of sentences.
FAULTS = """
() => {
  const faults = [], root = document.documentElement, seen = e => e.getClientRects().length > 0;
  if (root.scrollWidth > root.clientWidth) faults.push(`the page is ${root.scrollWidth} wide in ${root.clientWidth}`);
  for (const e of document.body.querySelectorAll("*")) {
    if (!seen(e) || e.closest("svg")) continue;
    const box = e.getBoundingClientRect();
    if (!e.closest(".wide") && (box.right > root.clientWidth + 1 || box.left < -1))
      faults.push(`<${e.tagName} class=${e.className}> reaches from ${box.left} to ${box.right}`);
    const style = getComputedStyle(e);
    if (["hidden", "clip"].includes(style.overflowX) && e.scrollWidth > e.clientWidth + 1)
      faults.push(`<${e.tagName}> hides text`);
    if (style.textOverflow === "ellipsis") faults.push(`<${e.tagName}> cuts text`);
  }
  for (const svg of document.querySelectorAll("svg.chart")) {
    if (!seen(svg)) continue;
    const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
    const boxes = texts.map(t => t.getBoundingClientRect());
    boxes.forEach((box, i) => {
      const word = `"${texts[i].lastChild.textContent}" in "${svg.getAttribute("aria-label")}"`;
      const wide = box.left < frame.left - 1 || box.right > frame.right + 1;
      if (wide || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) faults.push(`${word} is cut`);
      if (box.height < 10) faults.push(`${word} is ${box.height} high`);
      boxes.slice(0, i).forEach((other, j) => {
        const wide = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const high = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (wide > 1 && high > 4) faults.push(`${word} lies on "${texts[j].lastChild.textContent}"`);
      });
    });
  }
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = colours => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  for (const e of document.body.querySelectorAll("p, td, th, h1, h2, h3, summary, a, strong, span, pre, li, text")) {
    if (!seen(e) || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const behind = [];
    for (let at = e; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const style = getComputedStyle(e), paper = light(["white", ...behind]);
    const ink = light(["white", ...behind, e.tagName === "text" ? style.fill : style.color]);
    const contrast = (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
    const words = e.textContent.trim().slice(0, 30);
    if (contrast < 4.5) faults.push(`<${e.tagName}> "${words}" has contrast ${contrast.toFixed(2)}`);
  }
  return [...new Set(faults)];
}
"""


@pytest.fixture(scope="module")  # while it runs, no other test of this process can use asyncio
def browser() -> Iterator[Any]:
    """A browser of this machine, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(_BROWSERS)}")
    try:
        playwright = sync_api.sync_playwright().start()
    except Exception as error:
        pytest.skip(f"playwright does not start here: {error}")
    try:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
    except sync_api.Error as error:
        playwright.stop()
        pytest.skip(f"{program} does not start here: {error}")
    yield started
    started.close()
    playwright.stop()
