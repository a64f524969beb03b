"The house: floors, rooms that keep to themselves, what stands in them"
import ast, json, os, re, shutil, subprocess, sys, pytest
from pathlib import Path

root = Path(__file__).parent.parent
floors = 'predict','core data losses','models devices','layers','teacher','distill','learner','train compress look','experiments doctor','cli','all','skill'
floor_of = {package:i for i,o in enumerate(floors) for package in o.split()}
files = {'.'.join(f.relative_to(root).with_suffix('').parts):f for f in sorted((root/'kdfast').rglob('*.py')) if f.name!='_modidx.py'}
rooms = {k:ast.parse(f.read_text()) for k,f in files.items() if f.stem not in ('__init__','all')}

def package(room): return room.split('.')[1]

def imports(room):
    "`(module, name)` of whatever a room imports; the name is None for a whole module"
    for n in ast.walk(rooms[room]):
        if isinstance(n, ast.Import): yield from ((a.name, None) for a in n.names)
        if isinstance(n, ast.ImportFrom):
            base = room.split('.')[:-n.level] if n.level else []
            at = '.'.join([*base, *([n.module] if n.module else [])])
            for a in n.names: yield (f'{at}.{a.name}', None) if f'{at}.{a.name}' in files else (at, a.name)

def ours(room): return [(m, n) for m,n in imports(room) if m.startswith('kdfast.')]

def test_every_package_has_a_floor(): assert {package(o) for o in rooms}=={*floor_of}-{'all'}

@pytest.mark.parametrize('room', rooms)
def test_a_room_imports_from_lower_floors(room):
    for m,_ in ours(room): assert package(m)==package(room) or floor_of[package(m)]<floor_of[package(room)], f'{room} imports {m}'

def test_packages_import_in_one_order_inside():
    "No two rooms of a package import each other, directly or by way of others"
    needs = {o:{m for m,_ in ours(o) if package(m)==package(o)} for o in rooms}
    while needs:
        ready = {o for o,wants in needs.items() if not wants & {*needs}}
        assert ready, f'a circle among {[*needs]}'
        needs = {o:wants for o,wants in needs.items() if o not in ready}

@pytest.mark.parametrize('room', rooms)
def test_no_private_name_crosses_a_room(room):
    assert [(m, n) for m,n in ours(room) if (n or m.split('.')[-1]).startswith('_')]==[]
    modules = {m.split('.')[-1] for m,n in ours(room) if n is None}
    crossed = [ast.unparse(n) for n in ast.walk(rooms[room]) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in modules and re.match('_[^_]', n.attr)]
    assert crossed==[]

allowed = {*'torch fastcore kdfast collections contextlib copy difflib fnmatch functools io itertools math statistics time'.split()}
tables = {'kdfast.models.measure','kdfast.models.swap'}  # where the result is a table

@pytest.mark.parametrize('room', [o for o in rooms if package(o) in ('losses','models','layers')])
def test_the_lowest_rooms_need_torch_alone(room):
    assert {m.split('.')[0] for m,_ in imports(room)} <= allowed|({'pandas'} if room in tables else set())

def patched(room):
    "Class and name of what a room patches into classes"
    for n in rooms[room].body:
        if isinstance(n, ast.FunctionDef) and any('patch' in ast.unparse(o) for o in n.decorator_list): yield ast.unparse(n.args.args[0].annotation),n.name

def test_no_room_calls_what_a_higher_one_patches_into_it():
    homes = {n.name:room for room,tree in rooms.items() for n in tree.body if isinstance(n, ast.ClassDef)}
    called = {room:{n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} for room,tree in rooms.items()}
    wrong = [(name, room, homes[cls]) for room in rooms for cls,name in patched(room)
        if cls in homes and floor_of[package(homes[cls])]<floor_of[package(room)] and name in called[homes[cls]]]
    assert wrong==[]

def starred():
    "Public names of `kdfast.all`"
    import types, kdfast.all
    return [n for n,o in vars(kdfast.all).items() if not n.startswith('_') and not isinstance(o, types.ModuleType)]

def test_names_are_few(): assert len(starred())<=130

def checks(n):
    "Whether a `raise` is for the user: it makes an exception, and not one that only steers the loop"
    return isinstance(n.exc, ast.Call) and not re.match('Cancel|_Reached', ast.unparse(n.exc))

def test_lines_are_short_and_checks_few():
    lines = [o for f in files.values() for o in f.read_text().splitlines()]
    raised = sum(isinstance(n, ast.Raise) and checks(n) for tree in rooms.values() for n in ast.walk(tree))
    assert sum(len(o)>140 for o in lines)<=.015*len(lines)
    assert raised<=.025*len(lines)

def test_what_is_given_up_is_told():
    "Whoever catches everything raises or warns"
    for room,tree in rooms.items():
        for n in (o for o in ast.walk(tree) if isinstance(o, ast.ExceptHandler)):
            if n.type is not None and ast.unparse(n.type) not in ('Exception','BaseException'): continue
            text = '\n'.join(map(ast.unparse, n.body))
            assert re.search(r'\braise\b|warn|_failed\(|error = e|why = ', text), f'{room}, line {n.lineno}: {text}'

added = {'data/memory.ipynb':'''
@data_set(size=32, classes=2, images=(80,40))
def halves_dls(
    bs:int=64, # Batch size
    pct:float=1., # Fraction of each class to train on
    device=None # fastai's default device
) -> DataLoaders: # 80 images to train on, 40 to validate
    "Images whose left or right half is bright"
    x = torch.zeros(120, 3, 32, 32, dtype=torch.uint8)
    for i in range(120): x[i,:,:,slice(16) if i%2 else slice(16,32)] = 200
    y = ['left' if i%2 else 'right' for i in range(120)]
    return tensor_dls((x[:80],y[:80]), (x[80:],y[80:]), bs=bs, device=device)''', 'losses/core.ipynb':'''
def l1_loss(
    s:Tensor, # The student's maps
    t:Tensor # The teacher's, of the same shape
) -> Tensor: # Scalar
    "Mean absolute difference"
    return (at_least_float(s)-at_least_float(t)).abs().mean()''', 'models/nets.ipynb':'''
def tiny(
    n_out:int=10, # Number of classes
    conv=Full # What the second convolution is made of
) -> nn.Sequential: # Stages `stem layer1 layer2 pool flat fc`
    "Three convolutions"
    return init_he(nn.Sequential(OrderedDict(stem=_conv_layer(3, 8, 1, Full), layer1=_conv_layer(8, 8, 2, conv), layer2=_conv_layer(8, 16, 2, conv), **head_of(16, n_out))))'''}
used = '''
from fastai.vision.all import *
from kdfast.all import *
from kdfast.losses.all import l1_loss
learn = distill_learner(halves_dls(20), tiny(2), tiny, cbs=[KD(), FeatureKD(l1_loss)], metrics=accuracy)
with learn.no_bar(), learn.no_logging(): learn.fit(1)
assert learn.featurekd.layers and learn.recorder.history['l1'].gt(0).all()
from kdfast.cli import main
main(['doctor'])
main('distill --data halves --teacher wrn-10-1 --student tiny --conv separable --method kd --epochs 1 --bs 20 --out out'.split())
from kdfast.experiments.all import *
print(estimate([Run(data='halves', student='tiny', epochs=1)]).minutes[0])'''

@pytest.mark.slow
def test_a_data_set_a_loss_and_a_student_are_one_cell_each(tmp_path):
    "Added to a copy of the notebooks, and known to everyone after the export"
    def run(*args): return subprocess.run([str(o) for o in args], cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, 'PYTHONPATH':str(tmp_path), 'PYTHONWARNINGS':'ignore'})
    for o in ('nbs','kdfast'): shutil.copytree(root/o, tmp_path/o, ignore=shutil.ignore_patterns('howto','tutorials','explanation','__pycache__','.ipynb_checkpoints'))
    for o in ('pyproject.toml','settings.ini','README.md'): shutil.copy(root/o, tmp_path/o)
    for name,source in added.items():
        nb = json.loads((tmp_path/'nbs'/name).read_text())
        nb['cells'].append(dict(cell_type='code', id='added', metadata={}, outputs=[], execution_count=None, source=f'#| export{source}'.splitlines(True)))
        (tmp_path/'nbs'/name).write_text(json.dumps(nb))
    exported = run(Path(sys.executable).parent/'nbdev-export')
    assert exported.returncode==0, exported.stderr
    res = run(sys.executable, '-c', used)
    assert res.returncode==0 and '\n  halves ' in res.stdout and 'tiny' in (tmp_path/'out/records.jsonl').read_text(), res.stderr
    assert float(res.stdout.strip().split()[-1])>=0
