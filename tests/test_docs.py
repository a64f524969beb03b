"The pages: what they link to, what they tell of every symbol, and what the README's commands do"
import importlib, importlib.util, inspect, json, os, re, shlex, shutil, subprocess, sys, pytest, yaml
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

root = Path(__file__).parent.parent
nbs = root/'nbs'

def _tool():
    spec = importlib.util.spec_from_file_location('kdfast_site', root/'tools/site.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

tool = _tool()
notebooks = sorted(str(p.relative_to(nbs)) for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in str(p))
cells = {p: json.loads((nbs/p).read_text())['cells'] for p in notebooks}

class Page(HTMLParser):
    "Anchors, links and pictures of a page"
    def __init__(self, text):
        super().__init__()
        self.ids,self.links = set(),[]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[o] for o in ('id','name') if attrs.get(o)}
        self.links += [attrs[o] for o in ('href','src') if attrs.get(o)]

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Every page as nbdev makes it for Quarto, in HTML"
    out = tmp_path_factory.mktemp('site')/'kdfast'
    subprocess.run([sys.executable, '-W', 'ignore', root/'tools/site.py', out], check=True, capture_output=True, text=True, timeout=900)
    return out

@pytest.fixture(scope='session')
def pages(site): return {str(p.relative_to(site)): Page(p.read_text()) for p in site.rglob('*.html')}

# What is there

def test_every_notebook_is_in_the_sidebar_once():
    listed = [p for pages in tool.sidebar().values() for p in pages]
    assert sorted(listed)==notebooks
    for p in listed: tool.told(p)

def test_quartos_configuration():
    "Known options only, and every file that they name"
    told = yaml.safe_load((nbs/'_quarto.yml').read_text())
    assert set(told)=={'project','format','website','metadata-files'} and told['metadata-files']==['nbdev.yml','sidebar.yml']
    known = 'favicon open-graph repo-actions page-navigation navbar sidebar'.split()
    assert set(told['website'])<={*known} and told['website']['navbar']['search'] is True and set(told['format']['html']['theme'])=={'light','dark'}
    named = [told['website']['favicon'], told['website']['navbar']['logo'], told['format']['html']['css'], *told['project']['resources'], *(o['href'] for o in told['website']['navbar']['left'])]
    assert [o for o in named if not (nbs/o).exists()]==[]

def test_llms_txt_lists_every_page():
    text = (nbs/'llms.txt').read_text()
    assert text==tool.llms(), "make docs writes it anew"
    assert text.count('](https://')==len(notebooks)

def test_no_page_has_an_error_or_a_warning():
    for p,found in cells.items():
        for o in (o for c in found for o in c.get('outputs', [])):
            assert o['output_type']!='error', p
            assert not (o.get('name')=='stderr' and re.search('Warning|Traceback', ''.join(o['text']))), p

def test_what_a_cell_prints_is_one_box():
    kinds = lambda c: [(o['output_type'], o.get('name')) for o in c.get('outputs', [])]
    assert [(p, c['id']) for p,found in cells.items() for c in found if any(a==b and a[0]=='stream' for a,b in zip(kinds(c), kinds(c)[1:]))]==[]

def test_pages_that_teach_show_what_they_teach():
    "Every page of a guide has saved outputs and asserts something"
    for p in (p for p in notebooks if p.split('/')[0] in ('howto','tutorials','explanation','start.ipynb')):
        code = [c for c in cells[p] if c['cell_type']=='code']
        assert any(c['outputs'] for c in code), f'{p} has no saved output'
        assert re.search(r'\b(assert|test_\w+\(|expect_fail)', '\n'.join(''.join(c['source']) for c in code)), f'{p} asserts nothing'

# Links

def _ours(link):
    "The file of this repository that a link to GitHub names"
    m = re.match(r'https://github\.com/kdfast/kdfast/(?:blob|tree|edit|raw)/main/([^#?]*)', link)
    return root/unquote(m[1]) if m else None

@pytest.mark.slow
def test_links_pictures_and_anchors_resolve(site, pages):
    broken = []
    for name,page in pages.items():
        for link in page.links:
            if link.startswith(('data:','mailto:')): continue
            if link.startswith('http'):
                if (f := _ours(link)) and not f.exists() or link.startswith(tool.host): broken.append((name, link))
                continue
            file,_,anchor = unquote(link).partition('#')
            target = os.path.normpath(Path(name).parent/file) if file else name
            if not (site/target).is_file() or anchor and anchor not in pages[target].ids: broken.append((name, link))
    assert broken==[] and sum(len(p.links) for p in pages.values())>1000

def test_links_of_the_text_files():
    "README, CONTRIBUTING and the templates name pages and files that exist"
    urls = {tool.url_of(p) for p in notebooks}|{''}
    for f in (root/'README.md', root/'CONTRIBUTING.md', *(root/'.github').rglob('*.md'), *(root/'.github').rglob('*.yml')):
        text = f.read_text()
        for link in re.findall(r'https://kdfast\.github\.io/kdfast/([^\s)#"\']*)', text): assert link in urls, (f.name, link)
        for link in re.findall(r'https://github\.com/kdfast/kdfast/[^\s)"\']*', text): assert _ours(link) is None or _ours(link).exists(), (f.name, link)
        for link in re.findall(r'\]\((?!http)([^)#]+)\)', text): assert (f.parent/link).exists(), (f.name, link)

@pytest.mark.slow
def test_names_of_fastai_and_torch_become_links(pages):
    links = {o for p in pages.values() for o in p.links}
    assert any(o.startswith('https://docs.fast.ai/learner.html#learner') for o in links) and any(o.startswith('https://pytorch.org/docs/') for o in links)

@pytest.mark.slow
def test_no_link_shows_its_address(site):
    "As one does in the text of a link that nbdev has made a link already"
    assert [str(p) for p in site.rglob('*.html') if f'>{tool.host}' in p.read_text()]==[]

# Symbols

def _shown():
    "Symbol to its page, signature and the text below it"
    res = {}
    for p in notebooks:
        for c in json.loads((root/'_proc'/p).read_text())['cells']:
            for o in c.get('outputs', []):
                text = ''.join(o.get('data', {}).get('text/markdown', ''))
                m = re.search(r'^\[source\].*?\n\n#+ (\S+)\n\n```python\n(.*?)```\s*(.*)', text, re.S|re.M)
                if m: res[m[1].replace('\\_', '_')] = (p,m[2],m[3])
    return res

@pytest.mark.slow
def test_every_public_symbol_is_on_a_page(site, pages):
    from kdfast._modidx import d
    shown = _shown()
    for mod in d['syms']:
        for name in importlib.import_module(mod).__all__:
            o = getattr(importlib.import_module(mod), name)
            if not callable(o) or hasattr(o, '_fields'): continue  # a namedtuple is told of where it is returned
            assert name in shown, f'{mod}.{name}'
            assert tool.slug(name) in pages[tool.url_of(shown[name][0])].ids

def _object(name):
    "What a name on a page stands for, and the arguments that it has itself, not those which it passes on"
    from kdfast._modidx import d
    mod = next(mod for mod,syms in d['syms'].items() if f'{mod}.{name}' in syms)
    o = importlib.import_module(mod)
    for part in name.split('.'): o = inspect.getattr_static(o, part) if inspect.isclass(o) else getattr(o, part)
    o = o.fget if isinstance(o, property) else getattr(o, '__func__', o)
    f = vars(o).get('__init__') if inspect.isclass(o) else inspect.unwrap(o)
    if not inspect.isfunction(f): return o,[]
    code,n = f.__code__,f.__code__.co_argcount+f.__code__.co_kwonlyargcount
    return o,[k for k in code.co_varnames[:n+bool(code.co_flags & inspect.CO_VARARGS)] if k not in ('self','cls')]

@pytest.mark.slow
def test_every_symbol_says_what_it_does_and_what_it_takes(site):
    from fastcore.docments import docments
    shown,lacking = _shown(),[]
    for name,(page,_,text) in shown.items():
        o,takes = _object(name)
        told = docments(o) if takes else {}
        odd = [k for k in takes if not told.get(k)]
        if odd or not re.search(r'\w', text): lacking.append((page, name, odd))
    assert lacking==[] and len(shown)>220

# Search

def found(index, script, *queries):
    "Addresses that the script of the site finds for each query, best first"
    code = f'{index}\n{script}\nconsole.log(JSON.stringify({json.dumps(queries)}.map(q => find(q).map(o => o[0]))))'
    return json.loads(subprocess.run(['node','-'], input=code, check=True, capture_output=True, text=True, timeout=60).stdout)

needs_node = pytest.mark.skipif(not shutil.which('node'), reason='node runs the script')

@needs_node
def test_the_search_ranks_headings_before_pages_and_those_before_text():
    sections = [['text', 'One', 'Costs', 'prune, prune and prune'], ['inside', 'Two', 'unprune', ''], ['page', 'Prune', 'Costs', ''], ['begin', 'Two', 'prune_channels', ''],
        ['method', 'Two', 'Learner.prune', ''], ['none', 'Two', 'Costs', 'nothing']]
    index,script = f'const sections = {json.dumps(sections)}',(root/'tools/search.js').read_text()
    assert found(index, script, 'Prune', 'learn.prune', 'costs prune', ' ', '(.*') == [['method','begin','page','inside','text'],['method'],['page','text'],[],[]]

@pytest.mark.slow
def test_the_search_knows_every_section_and_symbol(site, pages):
    sections = json.loads((site/'index.js').read_text().partition(' = ')[2])
    targets = [o[0].partition('#') for o in sections]
    assert [(page, anchor) for page,_,anchor in targets if page not in pages or anchor and anchor not in pages[page].ids]==[]
    assert {page for page,_,anchor in targets if not anchor}=={*pages} and {*_shown()}<={o[2] for o in sections}

@needs_node
@pytest.mark.slow
def test_the_search_finds_what_is_defined_where_it_is_defined(site):
    wanted = {'KD':'distill/core.html#kd', 'fit_budget':'models/measure.html#fit_budget', 'int8':'compress/quantize.html', 'learn.fit_blocks':'train/blocks.html#learner.fit_blocks',
        'TeacherCache':'teacher/cache.html#teachercache', 'get started':'start.html', 'no layers to pair':'errors.html#no-layers-to-pair', 'resume a sweep':'howto/resume.html'}
    best = [o[0] for o in found((site/'index.js').read_text(), (site/'search.js').read_text(), *wanted)]
    assert [(q, o) for q,o in zip(wanted, best) if not o.startswith(wanted[q])]==[]

# README

readme = (root/'README.md').read_text()
blocks = re.findall(r'^```(\w*)\n(.*?)^```', readme, re.S|re.M)

def test_the_readmes_python_runs(monkeypatch, tmp_path):
    "From top to bottom, with a teacher, a student and data of one's own"
    from kdfast.all import digits_dls, wrn
    monkeypatch.chdir(tmp_path)
    code = [b for kind,b in blocks if kind=='python']
    space = dict(dls=digits_dls(64, per_class=8, size=16, valid=60), teacher=wrn(10, 2), student=wrn(10, 1))
    exec(code[0], space)
    assert 'distill_learner(dls, teacher, student, metrics=accuracy)' in code[0] and space['learn'].recorder.history['kd'].notna().all()
    assert [*tmp_path.rglob('student.pkl')]
    for b in code[1:]: exec(b, space)

def test_the_readmes_commands_exist():
    from kdfast.cli import _commands, _parser
    targets = re.findall(r'^([a-z]+):', (root/'Makefile').read_text(), re.M)
    lines = [o.partition('#')[0].strip() for kind,b in blocks if kind=='sh' for o in b.splitlines() if o.strip()]
    assert 'make demo' in lines and 'make test' in lines
    for o in lines:
        word,*args = shlex.split(o)
        if word=='make': assert args[0] in targets
        elif word=='kdfast': '--help' in args or _parser(_commands).parse_args(args)
        else: assert word in ('git','cd','pip','python')
    assert re.search(r'From `git clone` to 5 exported students, on \d+ cores: [\d.]+ minutes', readme), 'python benchmarks/first_run.py measures it'

def test_the_readme_can_be_read_in_minutes():
    "One picture of a result near the top, and no wall of text"
    assert len(readme.splitlines())<=90 and len(readme)<16_000 and readme.index('](README_files/')<3000
    assert max(len(o) for o in re.sub(r'\([^)]*\)|```.*?```', '', readme, flags=re.S).split('\n\n') if not o.startswith('|'))<900
