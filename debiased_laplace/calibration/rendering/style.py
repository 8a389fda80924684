"""The look of the page: one style sheet, no fonts and no files from elsewhere."""

STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1d2126; --soft: #5b636e; --line: #d9dde3; --panel: #f5f7f9;
  --accent: #0b66a8; --good: #00694c; --bad: #b04300; --caution: #fff6e0; --caution-line: #d9a400;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --text: #e6e9ed; --soft: #a3acb7; --line: #353b43; --panel: #1c2026;
    --accent: #6cb8ee; --good: #4fd1a5; --bad: #ff9a5c; --caution: #2c2612; --caution-line: #a88416;
  }
}
@media (prefers-color-scheme: dark) { .panels svg.figure { filter: brightness(1.3); } }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere;
}
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; }
h2 {
  font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .9rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.2rem 0 .25rem; }
p, ul, dl { max-width: 46rem; margin: .5rem 0; }
a { color: var(--accent); }
.facts, .note { color: var(--soft); font-size: .875rem; }
.verdict {
  max-width: none; margin: 1.2rem 0; padding: .8rem 1rem; font-size: 1.06rem;
  border-left: 4px solid var(--accent); background: var(--panel); border-radius: 0 6px 6px 0;
}
.verdict p { max-width: 60rem; margin: .15rem 0; }
.verdict .harm {
  margin: .4rem -.4rem; padding: .5rem .7rem; font-weight: 600; color: var(--bad);
  border: 2px solid var(--bad); border-radius: 6px;
}
.caution {
  padding: .6rem 1rem; background: var(--caution); border-left: 4px solid var(--caution-line);
  border-radius: 0 6px 6px 0;
}
.caution ul { margin: 0; padding-left: 1.1rem; }
.badges { list-style: none; display: flex; flex-wrap: wrap; gap: .4rem; padding: 0; max-width: none; }
.badge {
  padding: .15rem .6rem; border: 1px solid var(--soft); border-radius: 1rem; background: var(--panel);
  font-size: .85rem;
}
.badge.passed { border-color: var(--good); } .badge.passed b { color: var(--good); }
.badge.failed { border-color: var(--bad); } .badge.failed b { color: var(--bad); }
.scroll { overflow-x: auto; max-width: 100%; position: relative; }
.scroll:focus-visible, summary:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px;
}
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td {
  padding: .4rem .9rem .4rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal;
}
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; font-weight: 600; }
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
.headline { min-width: 100%; }
.headline th:first-child { min-width: 10.5rem; }
.headline td { min-width: 10.2rem; }
.headline thead th { max-width: 16rem; overflow-wrap: anywhere; }
.value { font-weight: 600; font-size: 1.02rem; }
.interval { white-space: nowrap; }
.interval, .aside { color: var(--soft); font-size: .82rem; }
.aside { display: block; font-weight: 400; }
.change { display: block; font-size: .82rem; }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; }
.panels {
  display: grid; gap: 1.2rem 1.4rem; margin: .9rem 0 .4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(18.5rem, 100%), 1fr));
}
.beside { display: flex; flex-wrap: wrap; gap: 0 2.4rem; }
.beside > div { flex: 1 1 24rem; min-width: 0; }
.beside > div:first-child { flex: 0 1 20rem; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .2rem; }
svg.figure { display: block; width: 100%; height: auto; }
svg.figure * { stroke-linejoin: round; stroke-linecap: butt; }
svg.figure text {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif !important;
}
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
details table { font-size: .8rem; }
dt { font-weight: 600; margin-top: .7rem; }
dd { margin: 0; }
.settings th { padding-right: 1.6rem; font-weight: 500; }
.settings td { overflow-wrap: anywhere; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .88em; }
@media (max-width: 40rem) {
  main { padding: 1.1rem .9rem 3rem; }
  h1 { font-size: 1.4rem; }
  .headline th:first-child { min-width: 7.5rem; }
}
@media (min-width: 40rem) {
  .headline th:first-child { position: sticky; left: 0; background: var(--page); }
}
@media print {
  :root { color-scheme: light; --page: #fff; --text: #000; --soft: #444; --line: #bbb;
    --panel: #fff; --caution: #fff; --good: #00573f; --bad: #8f3600; --accent: #0b4f80; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  .panels svg.figure { filter: none; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  h2, h3, figcaption { break-after: avoid; }
  tr { break-inside: avoid; }
  details:not([open]) { display: none; }
}
"""
