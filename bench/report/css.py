"""How the HTML page looks: light and dark, narrow and wide, on paper."""

CSS = """
:root { color-scheme: light dark; --ink: #22262b; --soft: #626a73; --paper: #fff; --panel: #f6f7f9; --line: #e3e6ea;
  --grid: #d9dde2; --blue: #0072b2; --win: #005f98; --loss: #b34700; --bad: #b3261e; --bad-paper: #fdeceb;
  --note-paper: #fff6dd; }
@media (prefers-color-scheme: dark) { :root { --ink: #d9dee4; --soft: #98a1ab; --paper: #14171a; --panel: #1b1f24;
  --line: #2c3238; --grid: #343a41; --blue: #3a97d9; --win: #63b3ea; --loss: #f0914a; --bad: #ff8a80;
  --bad-paper: #35191a; --note-paper: #322b16; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 86rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.75rem 0 0.4rem; }
h4 { font-size: 0.9rem; margin: 0 0 0.5rem; font-weight: 600; }
p { margin: 0.4rem 0; max-width: 48rem; }
p.soft, figcaption, .lead { color: var(--soft); }
.lead { margin: 0.25rem 0 1.25rem; }
a { color: var(--win); text-decoration: none; } a:hover { text-decoration: underline; }
nav { margin: 1.25rem 0 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1.1rem; font-size: 0.9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1.25rem; margin: 0; font-size: 0.9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.box { border-left: 4px solid; padding: 0.7rem 1rem; margin: 1.25rem 0; border-radius: 0 4px 4px 0; font-size: 0.9rem; }
.box ul { margin: 0.3rem 0 0; padding-left: 1.1rem; }
.box.bad { border-color: var(--bad); background: var(--bad-paper); }
.box.note { border-color: #d9a400; background: var(--note-paper); }
.box > b { display: block; } .box li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0.5rem 0 1rem; }
table { border-collapse: collapse; font-size: 0.84rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: 0.32rem 0.7rem; text-align: right; vertical-align: baseline; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0.25rem; }
thead th { color: var(--soft); font-weight: 500; white-space: normal; vertical-align: bottom; max-width: 8.5rem;
  border-bottom: 1px solid var(--ink); }
tbody tr { border-bottom: 1px solid var(--line); } tbody tr:hover { background: var(--panel); }
th.w, td.w { text-align: left; }
td.long { white-space: normal; min-width: 16rem; max-width: 28rem; overflow-wrap: anywhere; }
tbody th { font-weight: 400; white-space: normal; min-width: 17rem; max-width: 28rem; overflow-wrap: anywhere;
  position: sticky; left: 0; background: var(--paper); } tbody tr:hover th { background: var(--panel); }
td.case { min-width: 13rem; }
td.case small { display: block; max-width: 17rem; white-space: normal; margin-left: auto; overflow-wrap: anywhere; }
small { color: var(--soft); font-size: 0.85em; } td.none { color: var(--soft); }
.win { color: var(--win); font-weight: 600; } .loss { color: var(--loss); font-weight: 600; }
.win small, .loss small, .wrong small { font-weight: 400; }
.wrong { color: var(--bad); font-weight: 600; }
figure { margin: 1.25rem 0 2rem; } figure .scroll { margin: 0; }
figure svg { display: block; width: 100%; min-width: 38rem; max-width: 60rem; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif !important;
  font-variant-numeric: tabular-nums; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: 0.85rem; max-width: 60rem; margin-top: 0.3rem; }
ol { padding-left: 1.2rem; max-width: 52rem; } ol li { margin: 0.2rem 0; }
@media (max-width: 45rem) { tbody th { position: static; min-width: 11rem; } td.long { min-width: 11rem; } }
@page { size: landscape; margin: 1cm; }
@media print { body { max-width: none; padding: 0; font-size: 10px; } table { font-size: 7.5px; } nav { display: none; }
  .scroll { overflow: visible; }
  h2, h3, h4 { break-after: avoid; } figure, .box, tr { break-inside: avoid; } figure svg { min-width: 0; }
  th, td { padding: 0.2rem 0.35rem; } td small { display: block; } 
  tbody th { position: static; min-width: 16em; } }
"""
