"""The pages as a site that can be browsed without Quarto, llms.txt, and README.md: `python tools/site.py`

Quarto makes the published site. This one has the same pages, sidebar and links, to be read and tested where Quarto is not."""
import json, os, re, shutil, sys, warnings
from argparse import ArgumentParser
from html import escape, unescape
from pathlib import Path
import nbformat, yaml
from latex2mathml.converter import convert
from nbconvert import HTMLExporter, MarkdownExporter
from nbconvert.preprocessors import Preprocessor
from pygments.formatters import HtmlFormatter

root = Path(__file__).parent.parent
nbs,host = root/'nbs','https://kdfast.github.io/kdfast/'

def url_of(path):
    "Where the notebook `path`, relative to nbs, stands in the site"
    return str(Path(path).with_suffix('.html'))

def sidebar():
    "Section to notebooks, in reading order; those before the first section have none"
    res = {'':[]}
    for o in yaml.safe_load((nbs/'sidebar.yml').read_text())['website']['sidebar']['contents']:
        if isinstance(o, str): res[''].append(o)
        else: res[o['section']] = o['contents']
    return res

def told(path):
    "Title and subtitle of a notebook"
    text = '\n'.join(''.join(c['source']) for c in json.loads((nbs/path).read_text())['cells'] if c['cell_type']=='markdown')
    title,sub = re.search(r'^# (.+)', text, re.M),re.search(r'^> (.+)', text, re.M)
    if not (title and sub): raise ValueError(f"{path} has no title and subtitle: begin it with '# Title' and '> what it is'")
    return title[1],sub[1]

def llms():
    "What llms.txt says: every page with a line"
    line = lambda p: f'- [{told(p)[0]}]({host}{url_of(p)}.md): {told(p)[1]}'
    parts = [f'# kdfast\n\n> {told("index.ipynb")[1]}']
    for section,pages in sidebar().items(): parts.append((f'## {section}\n\n' if section else '') + '\n'.join(map(line, pages)))
    return '\n\n'.join(parts) + '\n'

def _known(tex):
    "What latex2mathml gets wrong, in words that it knows"
    return re.sub(r'\\math(bb|cal) (\w)', r'\\math\1{\2}', tex).replace(r'\big\|', r'\|')

def _math(text):
    "Formulas as MathML, which browsers draw without a script; those in code stay"
    def formula(m): return m[0] if m[1] else convert(_known(m[2] or m[3]), display='block' if m[2] else 'inline')
    return re.sub(r'(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|\$([^$\n]+)\$', formula, text, flags=re.S)

class Prepared(Preprocessor):
    "What Quarto does to cells: its attributes and options are removed, formulas become MathML"
    def __init__(self, math=True): super().__init__(); self.math = math
    def preprocess_cell(self, cell, resources, i):
        if cell.cell_type=='raw': cell.source = ''
        if cell.cell_type=='markdown': cell.source = self._plain(_math(cell.source) if self.math else cell.source)
        for o in cell.get('outputs', []):
            if 'text/markdown' in o.get('data', {}): o.data['text/markdown'] = self._plain(o.data['text/markdown'])
        if '#| echo: false' in cell.source: cell.metadata['transient'] = {'remove_source':True}
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
        return cell,resources

    def _plain(self, text): return re.sub(r'^:::.*$|\b__main__\.', '', re.sub(r'\)\{[^}\n]*="[^}\n]*\}', ')', text), flags=re.M)

def slug(text):
    "The anchor that Quarto gives a heading"
    text = re.sub(r'[^\w\s.-]', '', re.sub('<[^>]+>', '', text).strip().rstrip('¶')).lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', text)) or 'section'

def _anchored(html):
    def heading(m): return f'<h{m[1]} id="{slug(m[2])}">{m[2]}</h{m[1]}>'
    html = re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', '', html)
    return re.sub(r'<h([1-6]) id="[^"]*">(.*?)</h\1>', heading, html, flags=re.S)

def _tables(html):
    "Short cells stay on one line"
    def cell(m): return m[0] if len(re.sub('<[^>]+>', '', m[3]))>20 else f'<t{m[1]}{m[2]} class="short">{m[3]}</t{m[1]}>'
    return re.sub(r'<t([dh])\b([^>]*)>(.*?)</t\1>', cell, html, flags=re.S)

def _relative(html, page):
    "Links into the site, from the page `page`"
    return re.sub(rf'(href|src)="{host}([^"]*)"', lambda m: f'{m[1]}="{_to(page, m[2] or "index.html")}"', html)

def _to(page, target):
    file,_,anchor = target.partition('#')
    return os.path.relpath(file or page, Path(page).parent) + (f'#{anchor}' if anchor else '')

def _menu(page):
    part = lambda pages: '<ul>' + ''.join(f'<li><a href="{_to(page, url_of(p))}"{" aria-current=page" if url_of(p)==page else ""}>{escape(told(p)[0])}</a></li>' for p in pages) + '</ul>'
    return ''.join((f'<h2>{escape(section)}</h2>' if section else '') + part(pages) for section,pages in sidebar().items())

def _text(html): return ' '.join(unescape(re.sub(r'<style.*?</style>|<[^>]+>', ' ', re.sub(r'</?(span|code|a|em|strong)\b[^>]*>', '', html), flags=re.S)).split())

def _sections(page, title, sub, body):
    "What the search finds on a page: address, page, heading and text of each section"
    first,*parts = re.split(r'<h[1-6] id="([^"]*)">(.*?)</h[1-6]>', body, flags=re.S)
    found = [(page, title, f'{sub} {first}'), *((f'{page}#{anchor}', head, text) for anchor,head,text in zip(*[iter(parts)]*3))]
    return [[url, title, _text(head), _text(text)] for url,head,text in found]

def _code(text): return re.sub('`([^`]+)`', r'<code>\1</code>', escape(text))

def _page(page, title, sub, body, style):
    return f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} – kdfast</title><meta name="description" content="{escape(sub)}">
<link rel="icon" href="{_to(page, 'favicon.svg')}"><link rel="stylesheet" href="{_to(page, 'site.css')}"><style>{style}</style>
</head>
<body><header><a href="{_to(page, 'index.html')}"><img src="{_to(page, 'favicon.svg')}" alt="">kdfast</a><input type="search" placeholder="Search (press /)" aria-label="Search"><div id="found" aria-live="polite"></div></header>
<nav><details><summary>Pages</summary>{_menu(page)}</details></nav><main><h1>{escape(title)}</h1><p class="sub">{_code(sub)}</p>{body}</main>
<script>document.querySelector('details').open = innerWidth>900</script><script src="{_to(page, 'search.js')}"></script></body></html>'''

css = '''*{box-sizing:border-box}body{margin:0;font:17px/1.6 system-ui,sans-serif;color:#1d2733;background:#fff;display:grid;grid-template-columns:17rem minmax(0,1fr);grid-template-areas:"head head" "nav main"}
header{grid-area:head;background:#0b3c5d;padding:.5rem 1rem;display:flex;gap:1rem;align-items:center;justify-content:space-between;position:relative}header>a{flex:none;color:#fff;text-decoration:none;font-weight:600;font-size:1.15rem;display:flex;gap:.6rem;align-items:center}header img{height:1.7rem}
header input{font:inherit;font-size:.92rem;color:#fff;background:#fff2;border:1px solid #fff6;border-radius:6px;padding:.15rem .6rem;width:20rem;min-width:0}header input::placeholder{color:#c8d6e0}
#found{position:absolute;z-index:1;top:100%;right:1rem;width:min(36rem,100% - 2rem);max-height:75vh;overflow:auto;background:#fff;border-radius:0 0 8px 8px;font-size:.92rem}#found:not(:empty){padding:.4rem;box-shadow:0 6px 20px #0006}
#found a{display:block;padding:.3rem .6rem;border-radius:6px;color:inherit;text-decoration:none;overflow-wrap:anywhere}#found a:is(:focus,:hover){background:#dcebf6;outline:none}#found small{display:block;color:#5b6b7b;overflow:hidden;white-space:nowrap;text-overflow:ellipsis}
nav{grid-area:nav;padding:1rem;font-size:.92rem}nav h2{font-size:.92rem;margin:1.1rem 0 .2rem}nav ul{list-style:none;margin:0;padding:0}nav li{margin:.1rem 0}nav a[aria-current]{font-weight:700}summary{cursor:pointer;font-weight:600}
main{grid-area:main;max-width:57rem;padding:1rem 1.5rem 5rem;overflow-wrap:break-word}h1{margin-bottom:0}.sub{color:#5b6b7b;margin-top:.2rem;font-size:1.1rem}a{color:#0b62a4}
pre{overflow-x:auto;padding:.6rem .8rem;border-radius:6px;font-size:.83rem;line-height:1.45;margin:.4rem 0;background:#f4f6f8}.output_area :not(.highlight)>pre{background:none;border-left:3px solid #d7dee5;border-radius:0}
img,svg{max-width:100%;height:auto}.output_png img{background:#fff}table{border:0;border-collapse:collapse;font-size:.86rem;margin:.6rem 0}table td,table.dataframe thead th,th{padding:.25rem .5rem;border:0;border-bottom:1px solid #d7dee5;text-align:left}
code{font-size:.9em;overflow-wrap:anywhere}.short{white-space:nowrap}td:not(.short){min-width:9rem}
@media(max-width:900px){body{grid-template-columns:minmax(0,1fr);grid-template-areas:"head" "nav" "main"}main{padding:0 1rem 4rem}nav{padding:.6rem 1rem 0}}
@media(prefers-color-scheme:dark){body,#found{color:#d9e1e8;background:#12181f}#found:not(:empty){box-shadow:0 0 0 1px #33414f}#found a:is(:focus,:hover){background:#22405a}.sub,#found small{color:#93a4b4}a{color:#6cb8f0}pre{background:#1b242e}table td,table.dataframe thead th,th,.output_area :not(.highlight)>pre{border-color:#33414f}}
'''

def styles():
    light,dark = (HtmlFormatter(style=o).get_style_defs('.highlight') for o in ('default','monokai'))
    keep = lambda s: '\n'.join(o for o in s.splitlines() if not re.search(r'background|^pre|linenos', o))
    return f'{keep(light)}\n@media(prefers-color-scheme:dark){{{keep(dark)}}}'

def build(out, proc=root/'_proc'):
    "Write the site of the processed notebooks in `proc` to `out`"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for o in ('favicon.svg','llms.txt'): shutil.copy(nbs/o, out/o)
    shutil.copy(root/'tools/search.js', out)
    (out/'site.css').write_text(css + (nbs/'styles.css').read_text())
    exporter,style = HTMLExporter(template_name='basic', preprocessors=[Prepared()], exclude_input_prompt=True, exclude_output_prompt=True),styles()
    index = []
    for path in (p for pages in sidebar().values() for p in pages):
        page,raw = url_of(path),json.loads((proc/path).read_text())
        for c in raw['cells']: c['metadata'].pop('execution', None)  # nbdev's, which nbformat does not know
        nb = nbformat.reads(json.dumps(raw), as_version=4)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            body,_ = exporter.from_notebook_node(nb)
        body,dest = _relative(_tables(_anchored(body)), page),out/page
        dest.parent.mkdir(parents=True, exist_ok=True)
        dest.write_text(_page(page, *told(path), body, style))
        index += _sections(page, *told(path), body)
        for pic in (nbs/path).parent.glob('*.svg'): shutil.copy(pic, dest.parent)
    (out/'index.js').write_text(f'const sections = {json.dumps(index, ensure_ascii=False)}')

def _fenced(text):
    "Markdown whose unnamed code blocks are Python"
    lines,inside = text.splitlines(),False
    for i,o in enumerate(lines):
        if not o.startswith('```'): continue
        if o=='```' and not inside: lines[i] = '```python'
        inside = not inside
    return '\n'.join(lines)

def readme(out):
    "Write README.md and its pictures, from the index, to the folder `out`"
    nb = nbformat.read(nbs/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\| hide', c.source)]
    text,resources = MarkdownExporter(preprocessors=[Prepared(math=False)]).from_notebook_node(nb, resources=dict(output_files_dir='README_files', unique_key='README'))
    shutil.rmtree(out/'README_files', ignore_errors=True)
    (out/'README_files').mkdir(parents=True)
    for name,picture in resources['outputs'].items(): (out/name).write_bytes(picture)
    (out/'README.md').write_text(re.sub(r'\n{3,}', '\n\n', _fenced(text)).strip() + '\n')

def process():
    "Notebooks as Quarto gets them, in _proc"
    os.chdir(root)
    warnings.simplefilter('ignore')
    os.environ['PYTHONWARNINGS'] = 'ignore'
    from IPython.core.interactiveshell import InteractiveShell
    from nbdev.serve import proc_nbs
    InteractiveShell.atexit_operations = lambda self: None  # each notebook has a shell, and each would collect garbage for a third of a second
    proc_nbs(force=True, n_workers=0)

if __name__=='__main__':
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('out', nargs='?', type=Path, default=root/'_docs', help='folder of the site, made anew')
    parser.add_argument('--readme', action='store_true', help='README.md and its pictures alone, to that folder')
    args = parser.parse_args()
    if args.readme: sys.exit(readme(args.out))
    (nbs/'llms.txt').write_text(llms())
    process()
    build(args.out)
    print(args.out/'index.html')
