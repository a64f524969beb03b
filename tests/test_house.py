"The house: floors, rooms that keep to themselves, what stands in them"
import ast, builtins, re, pytest
from pathlib import Path

root = Path(__file__).parent.parent
floors = 'core data losses','models devices','layers','teacher','distill','learner','train compress look','experiments doctor','cli','all'
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
