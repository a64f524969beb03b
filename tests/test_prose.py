"The English of README, pages, docstrings, comments and messages: phrases that read like a translation, with what to write in their place"
import ast, io, json, re, tokenize, pytest
from pathlib import Path

root = Path(__file__).parent.parent
habits = {r'puts? out':'outputs', r'(goes|go|gone|going) on with':'resumes from', r'(begins?|began|begun|starts?) anew':'restarts', r'ma(de|kes?) again':'rerun', r'on record':'recorded',
    r"of one's own":'custom', r'weighs? nothing':'has zero weight', r'loud':'high-weight', r'as ever':'as usual', r'(is|are|be|was|were) asked|asks? the teacher|asked (once|about)':'the teacher runs',
    r'taught (student|by)':'distilled', r'(is|are) told':'receives', r'beside':'alongside, compared with', r'the way out':'the remedy', r'by themselves':'automatically', r'in other words':'say which',
    r'(network|teacher|student|learner|term|layer)s? (says?|tells?)':'outputs, reports'}

def prose(file):
    "Markdown without code, formulas and links' targets"
    if file.suffix=='.md': text = file.read_text()
    else: text = '\n\n'.join(''.join(c['source']) for c in json.loads(file.read_text())['cells'] if c['cell_type']=='markdown')
    return re.sub(r'```.*?```|`[^`]*`|\$[^$]*\$|\]\([^)]*\)', ' ', text, flags=re.S)

def found(text): return [(m[0], better) for habit,better in habits.items() for m in re.finditer(rf'\b({habit})\b', text)]

pages = [root/'README.md', root/'CONTRIBUTING.md', *sorted(o for o in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)]
modules = sorted(o for o in (root/'kdfast').rglob('*.py') if o.name!='_modidx.py')

def words(file):
    "Comments, docstrings and all other strings of a module that are sentences, a line each"
    text = file.read_text()
    strings = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type==tokenize.COMMENT]
    return '\n'.join(re.sub('`[^`]*`', ' ', o) for o in strings+comments if ' ' in o)

@pytest.mark.parametrize('page', pages, ids=lambda o: o.relative_to(root).as_posix())
def test_no_habits(page): assert found(prose(page))==[]

def text(node):
    "The text of an expression, with … for what is filled in"
    if isinstance(node, ast.Constant) and isinstance(node.value, str): return node.value
    if isinstance(node, ast.JoinedStr): return ''.join(map(text, node.values))
    return text(node.left)+text(node.right) if isinstance(node, ast.BinOp) else '…'

def messages(file):
    "Messages of the exceptions and warnings in a module"
    calls = [o.exc if isinstance(o, ast.Raise) else o for o in ast.walk(ast.parse(file.read_text())) if isinstance(o, (ast.Raise,ast.Call))]
    called = lambda c: getattr(c.func, 'attr', getattr(c.func, 'id', ''))
    return [text(c.args[0]) for c in calls if isinstance(c, ast.Call) and c.args and (called(c)=='warn' or called(c).endswith('Error'))]

@pytest.mark.parametrize('module', modules, ids=lambda o: o.relative_to(root).as_posix())
def test_messages_are_one_short_sentence_and_a_remedy(module):
    assert [o for o in messages(module) if len(o.rpartition(': ')[0] or o)>120]==[]

def test_messages_are_found(): assert sum(len(messages(o)) for o in modules)>250

@pytest.mark.parametrize('module', modules, ids=lambda o: o.relative_to(root).as_posix())
def test_no_habits_in_code(module): assert found(words(module))==[]

def test_habits_are_found(): assert [b for _,b in found("The teacher is asked once, and what it puts out is on record, beside the others")]==['outputs','recorded','the teacher runs','alongside, compared with']
