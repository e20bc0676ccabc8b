"""The style sheet of `report.html`: light and dark, readable on a phone, nothing fetched."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5d6670; --paper: #fdfdfc; --line: #d9dcdf; --card: #f4f5f5;
  --accent: #2563a8; --warn: #a4431d; --good: #2c7a4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6e8; --soft: #9aa4ad; --paper: #15181b; --line: #343a40;
  --card: #1d2226; --accent: #7fb2e5; --warn: #e79a78; --good: #7cc99a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 76rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.soft, caption, figcaption { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; } .plot svg { min-width: 30rem; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding: .2rem 0 .5rem; max-width: 46rem; }
th, td { padding: .32rem .9rem .32rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, th.text, td.text { text-align: left; }
th.soft { padding-top: .9rem; font-weight: 600; }
td.text { white-space: normal; min-width: 8rem; }
td small { color: var(--soft); display: block; }
tbody th { font-weight: 500; }
tr.best td.main, .best > figcaption b { color: var(--good); font-weight: 600; }
svg { max-width: 100%; height: auto; color: var(--ink); display: block; margin: .4rem 0 1.2rem; }
svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .mark { fill: var(--accent); stroke: var(--accent); }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 1.6; } svg .faint { fill: var(--soft); }
.pictures { display: flex; flex-wrap: wrap; gap: .9rem; margin: .4rem 0 1.8rem; }
.pictures figure { width: 9.2rem; } .pictures.few figure { width: 13.5rem; }
.pictures.curves figure { width: 26rem; max-width: 100%; }
figure { margin: 0; min-width: 0; } figure.picture { background: var(--card); border-radius: 6px; overflow: hidden;
  border: 2px solid transparent; }
figure.best { border-color: var(--good); }
figure img, .missing { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
img.small { image-rendering: pixelated; }
.missing { display: grid; place-content: center; text-align: center; padding: .6rem; font-size: .8rem;
  color: var(--soft); background: repeating-linear-gradient(45deg, transparent 0 8px, var(--line) 8px 9px); }
figcaption { padding: .45rem .6rem .6rem; line-height: 1.4; overflow-wrap: anywhere; font-size: .8rem; }
figcaption b { color: var(--ink); font-size: .88rem; } figcaption span { display: block; }
figcaption .written { max-height: 8.4em; overflow: auto; }
.chat { margin: .3rem 0 .8rem; } .chat p { margin: .3rem 0; padding: .4rem .8rem; width: fit-content; max-width: 40rem;
  background: var(--card); border-radius: 10px; white-space: pre-line; } .chat .assistant { color: var(--soft);
  margin-left: 2rem; } .chat img { width: 6rem; border-radius: 4px; }
.warn { color: var(--warn); } .good { color: var(--good); }
@media (max-width: 40rem) {
  body { padding: 1.2rem .8rem 3rem; font-size: 15px; }
  th, td { padding-right: .6rem; }
  .pictures figure, .pictures.few figure { width: calc(50% - .45rem); }
  .pictures.curves figure { width: 100%; }
}
"""
