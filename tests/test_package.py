"What is installed: names, extras, the distribution, the command"
import importlib.util, os, re, subprocess, sys, tarfile, zipfile, pytest, yaml
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).parent.parent

def run(*args, **kwargs): return subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=300, **kwargs)

def test_no_name_shadows_fastai():
    import fastai.vision.all as fastai, kdfast.all as kdfast, pkgutil, importlib
    rooms = [importlib.import_module(m.name) for m in pkgutil.walk_packages([str(root/'kdfast')], 'kdfast.')]
    public = {n for m in rooms if m.__name__ not in ('kdfast.cli','kdfast.experiments.spec') for n in getattr(m, '__all__', ())}
    assert len(public)>150 and not public & set(dir(fastai))
    starred = [m for m in rooms if m.__name__.endswith('.all') or m.__name__.count('.')==1]  # by the folder, or in a room of its own
    assert public <= set().union(*map(dir, starred))

def test_imports_without_dev_tools():
    "Nothing that only developers or extras install is imported"
    blocked = [o.split('>')[0] for o in setting('extras', 'dev')]
    code = f"import sys; sys.modules.update({{k: None for k in {blocked}}}); from kdfast.all import *; print(count_params(wrn(40,2), buffers=True))"
    res = run(sys.executable, '-c', code)
    assert res.returncode==0, res.stderr
    assert res.stdout.strip()=='2248954'

def setting(section, key):
    cfg = ConfigParser()
    cfg.read(root/'settings.ini')
    return cfg[section][key].split()

@pytest.mark.slow
def test_the_sdist_builds_and_its_wheel_installs(tmp_path):
    res = run(sys.executable, '-m', 'build', '--outdir', tmp_path, root)
    assert res.returncode==0, res.stdout+res.stderr
    wheel, = tmp_path.glob('*.whl')
    assert len(list(tmp_path.glob('*.tar.gz')))==1
    res = run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--quiet', '--target', tmp_path/'site', wheel)
    assert res.returncode==0, res.stderr
    res = run(sys.executable, '-c', 'import kdfast.all; print(kdfast.__file__)', cwd=tmp_path, env={**os.environ, 'PYTHONPATH':str(tmp_path/'site')})
    assert res.stdout.strip()==str(tmp_path/'site/kdfast/__init__.py'), res.stderr
    meta = next((tmp_path/'site').glob('kdfast-*.dist-info')).joinpath('METADATA').read_text()
    assert all(f'Requires-Dist: {o}' in meta for o in setting('DEFAULT', 'requirements'))
    assert 'License: Apache-2.0' in meta and all(f'Provides-Extra: {o}' in meta for o in ('prune','factorize','onnx','sweep','dev'))
    always = [o for o in meta.splitlines() if o.startswith('Requires-Dist:') and 'extra ==' not in o]
    assert len(always)==len(setting('DEFAULT', 'requirements'))
    with zipfile.ZipFile(wheel) as z: ours = {o for o in z.namelist() if '.dist-info/' not in o}
    assert ours=={str(o.relative_to(root)) for o in (root/'kdfast').rglob('*') if o.suffix in ('.py','.csv')}
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as t: held = {o.partition('/')[2] for o in t.getnames()}
    assert {'README.md','LICENSE','CHANGELOG.md','CITATION.cff','CONTRIBUTING.md','settings.ini'} <= held and not any(o.startswith(('nbs/','results/','.venv')) for o in held)

def test_agents_find_the_skill():
    "pyskills lists it, its first line tells when to read it, and all calls in its text exist, with these arguments; its notebook runs the examples"
    import fastai.vision.all as fastai, inspect, kdfast.all as public
    from importlib.metadata import entry_points
    from kdfast import skill
    assert [o.load() for o in entry_points(group='pyskills') if o.name=='kdfast']==[skill] and 'kdfast = "kdfast.skill"' in (root/'pyproject.toml').read_text()
    text = inspect.getdoc(skill)
    spans = re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', text, flags=re.S))
    found = lambda name: next((getattr(m, name) for m in (public, fastai, fastai.Learner) if hasattr(m, name)), None)
    calls = [(name,args) for o in spans for name,args in re.findall(r'(?:^| = |learn\.)(\w+)\(([^()]*)\)', o)]
    assert 'Read this before' in text.split('\n')[0] and {'distill_learner','KD','quantize','show_distill','export_onnx'} <= {name for name,_ in calls}
    assert [o for o in spans if re.fullmatch(r'[A-Z]\w+', o) and o!='None' and found(o) is None]==[]
    for name,args in calls:
        if name=='partial': continue
        given = [o.strip() for o in args.split(',') if o.strip()]
        keys = [o.partition('=')[0] for o in given if '=' in o]
        inspect.signature(found(name)).bind_partial(*given[len(keys):], **dict.fromkeys(keys))

def test_one_version(capsys):
    import kdfast
    assert '\nversion =' not in (root/'pyproject.toml').read_text().split('[tool.')[0]
    from kdfast.cli import main
    with pytest.raises(SystemExit): main(['--version'])
    assert capsys.readouterr().out.strip()==f'kdfast {kdfast.__version__}'

def test_command_line(capsys):
    "Each subcommand has its own help, an unknown option or command ends with code 2"
    from kdfast.cli import main
    def exit_of(*args):
        with pytest.raises(SystemExit) as e: main([*args])
        return e.value.code,*capsys.readouterr()
    assert 'demo' in exit_of('--help')[1] and '--teacher-epochs' in exit_of('demo', '--help')[1]
    for args in (['demo','--nope'], ['dmeo'], []):
        code,_,err = exit_of(*args)
        assert code==2 and 'usage: kdfast' in err

@pytest.mark.slow
@pytest.mark.skipif(not (root/'.venv/developing').exists(), reason='only in the environment that make test makes')
def test_the_readme_is_what_its_notebook_says(tmp_path):
    res = run('make', 'readme', f'OUT={tmp_path}', cwd=root)
    assert res.returncode==0, res.stderr
    assert (tmp_path/'README.md').read_text()==(root/'README.md').read_text()

def test_the_changelog_is_in_nbdevs_form():
    "nbdev-changelog puts a new version below the mark; this version has an entry, which begins with at most ten lines"
    import kdfast
    text = (root/'CHANGELOG.md').read_text()
    assert text.startswith('# Release notes\n\n<!-- do not remove -->\n\n## ') and f'\n## {kdfast.__version__}\n' in text
    brief = re.search(rf'^## {re.escape(kdfast.__version__)}\n(.*?)^### ', text, re.M|re.S)[1]
    assert len(re.findall('^- ', brief, re.M))<=10

def test_citation_and_templates_can_be_read():
    cite = yaml.safe_load((root/'CITATION.cff').read_text())
    assert all(cite[o] for o in ('cff-version','message','title','authors','license','repository-code')) and 'version' not in cite
    for f in (root/'.github/ISSUE_TEMPLATE').glob('*.yml'):
        told = yaml.safe_load(f.read_text())
        assert f.name=='config.yml' or told['name'] and told['description'] and all(o['type'] in ('markdown','textarea') for o in told['body'])

def test_notebooks_are_small():
    assert all(f.stat().st_size<500_000 for f in (root/'nbs').rglob('*.ipynb'))

def test_lessons_about_precision_are_run_on_both_kinds_of_processor():
    spec = importlib.util.spec_from_file_location('notebooks', root/'tools/notebooks.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    about = {str(o.relative_to(root/'nbs')) for o in (root/'nbs').rglob('*.ipynb') if tool.about_precision(o)}
    assert {'teacher/inference.ipynb','learner.ipynb','explanation/speed.ipynb'} <= about
