"""The looks of the page, and the Content-Security-Policy that lets them through and nothing else."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from typing import Final

__all__ = ["CONTENT_SECURITY_POLICY", "STYLE"]

STYLE: Final = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --raised: #f5f7f9; --text: #1b1f24; --quiet: #57606a; --line: #d0d7de; --link: #0550ae;
  --good: #116329; --warn: #7a4d00; --bad: #a40e26; --busy: #0b4da2; --wait: #d3e5f8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0f1318; --raised: #181d24; --text: #e6e9ed; --quiet: #a2acb8; --line: #343b44; --link: #79b8ff;
    --good: #6fdd8b; --warn: #e6b450; --bad: #ff948b; --busy: #79b8ff; --wait: #1d3a5c;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: 1rem 1.25rem 4rem; max-width: 84rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
code, .figure b { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 0.9em; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; padding-bottom: 0.25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.25rem; }
p { margin: 0.25rem 0; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 2px; }
.quiet, caption { color: var(--quiet); }
.good { color: var(--good); }
.warn { color: var(--warn); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
nav ul { list-style: none; margin: 0.5rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1.25rem; }
nav a { display: inline-block; padding: 0.25rem 0; }
.problems { margin: 1rem 0 0; padding: 0.5rem 1rem; border: 1px solid var(--bad); border-left-width: 0.4rem; border-radius: 4px; }
.figures {
  list-style: none; margin: 1rem 0 0; padding: 0; display: grid; gap: 0.75rem;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr));
}
.figure {
  padding: 0.5rem 0.75rem; border: 1px solid var(--line); border-radius: 6px; background: var(--raised);
}
.figure b { display: block; font-size: 1.35rem; line-height: 1.4; }
.figure span { font-size: 0.875rem; }
table { width: 100%; border-collapse: collapse; margin: 0.5rem 0 1rem; font-size: 0.9375rem; }
caption { text-align: left; padding: 0 0 0.25rem; font-size: 0.875rem; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 1.25rem 0.35rem 0; border-bottom: 1px solid var(--line); }
thead th { font-size: 0.8125rem; color: var(--quiet); font-weight: 600; overflow-wrap: normal; }
tbody th { font-weight: 600; }
tbody th > * { font-weight: 400; }
tbody th > code { font-weight: 600; }
caption code { color: var(--text); font-size: 0.9375rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
tr > :last-child { padding-right: 0; }
.whole { white-space: nowrap; }
ol, td ul { margin: 0.25rem 0; padding-left: 1.25rem; }
summary { cursor: pointer; }
details.dispatch { border: 1px solid var(--line); border-radius: 6px; margin: 0.5rem 0; padding: 0.4rem 0.75rem; }
details.dispatch[open] { background: var(--raised); }
td.bar { width: 38%; min-width: 8rem; }
svg { display: block; width: 100%; height: 1rem; margin-top: 0.25rem; background: var(--ground); border: 1px solid var(--line); border-radius: 2px; }
rect.busy { fill: var(--busy); stroke: var(--busy); }
rect.wait { fill: var(--wait); stroke: var(--busy); }
rect { stroke-width: 1px; vector-effect: non-scaling-stroke; }
.key { display: inline-block; width: 1.5rem; height: 0.75rem; border: 1px solid var(--busy); border-radius: 2px; vertical-align: -0.05rem; }
.key.busy { background: var(--busy); }
.key.wait { background: var(--wait); margin-left: 0.75rem; }
@media (max-width: 58rem) {
  body { padding: 0.75rem 0.75rem 3rem; }
  table, caption, tbody, tr, th, td { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { border: 1px solid var(--line); border-radius: 6px; padding: 0.4rem 0.75rem; margin: 0.5rem 0; background: var(--ground); }
  th, td { border: 0; padding: 0.15rem 0; }
  td[data-label]::before { content: attr(data-label) ": "; color: var(--quiet); font-size: 0.8125rem; }
  td:empty { display: none; }
  .number { text-align: left; }
  td.bar { width: auto; }
}
"""
"""The one style sheet. It names no font, picture or address of elsewhere."""

CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        f"style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'",
        "base-uri 'none'",
        "form-action 'none'",
    )
)
"""Allows the style sheet by its hash; no script, no picture, no request, no frame, no form."""
