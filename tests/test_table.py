"`kdfast table`, and the tables that are committed"
import json, re, shlex, pytest
from fastai.vision.all import *
from kdfast.all import *
from kdfast.experiments import records as records_module
from kdfast.experiments.records import Records
from kdfast.experiments.arm import load_network
from kdfast.experiments.run import Run, do_run, network_at
from kdfast.experiments.sweep import with_controls
from kdfast.cli import main
from kdfast.core import digest
from kdfast.experiments.spec import methods, network_of, terms_of
from kdfast.experiments.research import research, table_of
from kdfast.experiments.tables import _schedules, estimate

root = Path(__file__).parent.parent

def fails(message, *args):
    with pytest.raises(SystemExit) as e: main(['table', *map(str, args)])
    assert str(e.value).startswith('kdfast: ') and message in str(e.value), e.value

bad = {'table':(['banana'], "Unknown table 'banana': choose from methods, methods-cifar10, moonshine, best-teacher, sanity"), 'row':(['sanity','--rows','16-1 from 99-1'], 'choose from 16-1 from 16-2, 16-1 from 40-1'),
    'arm':(['taps','--arms','AT12'], "Unknown arm 'AT12': choose from alone, AT, AT6, AT9, AT18"), 'schedule':(['sanity','--schedule','quick'], 'choose from smoke, cpu, short, full'),
    'seeds':(['sanity','--seeds','0'], '--seeds must be at least 1'), 'workers':(['sanity','--workers','0'], '--workers must be at least 1'), 'imagenet on a cpu':(['imagenet','--schedule','cpu'], 'choose short or full'),
    'no imagenet':(['imagenet'], 'pass the folder that holds its train and val'), 'no folder':(['sanity','--data','/nowhere'], "No such file or directory: '/nowhere'"),
    'nothing yet':(['sanity','--report'], 'Nothing of sanity at the schedule short is recorded: run kdfast table sanity'), 'out':(['sanity','--schedule','smoke','--out','/proc/nothing/here'], '/proc/nothing'),
    'rows of two':(['sanity,taps','--rows','40-1 DW'], "Unknown row '40-1 DW': choose from 16-1 from 16-2")}

@pytest.mark.parametrize('case', bad)
def test_bad_arguments(case, tmp_path, monkeypatch):
    "Each is found before anything is trained"
    args,message = bad[case]
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('trained'))
    monkeypatch.chdir(tmp_path)
    fails(message, *args)
    assert not [*tmp_path.rglob('*.pth')]

@pytest.mark.slow
def test_failures_are_told_and_the_rest_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('kdfast.experiments.spec.methods', lambda known=methods: {**known(), 'at':Broken})
    fails("1 of 4 runs of sanity-smoke are not done: wrn-16-1 at:weight=1000 from wrn-16-2, seed 0", 'sanity', '--schedule', 'smoke', '--rows', '16-1 from 16-2', '--out', tmp_path)
    assert 'failed, ValueError: no such luck' in capsys.readouterr().out
    monkeypatch.undo()
    time.sleep(1.1)
    main(['table','sanity','--schedule','smoke','--rows','16-1 from 16-2','--out',str(tmp_path),'--retry'])
    out = capsys.readouterr().out
    assert out.count('% in ')==1 and '| 16-1 from 16-2 |' in out and 'These numbers mean nothing' in out
    assert {o.name for o in (tmp_path/'tables').iterdir()}=={f'sanity-smoke{o}' for o in ('.md','.csv','.svg','.png','-curves.svg','-curves.png')}
    before = (tmp_path/'tables/sanity-smoke.md').read_bytes()
    main(['table','sanity','--schedule','smoke','--report','--out',str(tmp_path)])
    assert (tmp_path/'tables/sanity-smoke.md').read_bytes()==before
    assert '% in ' not in capsys.readouterr().out

class Broken(AT):
    def term(self): raise ValueError('no such luck')

@pytest.mark.parametrize('args', [pytest.param('imagenet --schedule full', marks=pytest.mark.slow), pytest.param('substitutions --schedule full', marks=pytest.mark.slow), 'pruning --schedule cpu'])
def test_a_dry_run_needs_neither_data_nor_half_a_minute(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('kdfast.data.files.untar_data', lambda *args: pytest.fail('downloaded'))
    name,_,schedule = args.split()
    n = len(with_controls(table_of(name).runs(schedule)))
    start = time.process_time()
    main(['table', *args.split(), '--dry-run'])
    assert time.process_time()-start<30
    out = capsys.readouterr().out
    assert f'{n} runs of {name} at the schedule {schedule}, about ' in out and len(re.findall(r', seed 0 ', out))==n
    assert not [*tmp_path.iterdir()]

@pytest.mark.parametrize('file', sorted((root/'results/tables').glob('*-cpu.md')), ids=lambda f: f.stem)
def test_the_command_below_a_table_is_understood(file, tmp_path, monkeypatch, capsys):
    "It asks for the arms that the table shows, labels with a comma among them"
    command, = re.findall(r'`kdfast (table .*?)`', file.read_text())
    asked = []
    monkeypatch.setattr('kdfast.cli.estimate', lambda runs: asked.extend(runs) or pd.DataFrame(dict(run=map(str, runs), minutes=[1.]*len(runs))))
    main([*shlex.split(command), '--dry-run', '--out', str(tmp_path)])
    name,_,schedule = shlex.split(command)[1:4]
    shown = pd.read_csv(file.with_suffix('.csv')).arm
    wanted = {o.method for o in table_of(name).runs(schedule, arms=[o for o in dict.fromkeys(shown) if o not in ('alone','teacher')] or None)}
    assert wanted <= {o.method for o in asked} and f' runs of {name} at the schedule {schedule}' in capsys.readouterr().out

@pytest.mark.slow
@pytest.mark.parametrize('schedule', ['cpu','full'])
def test_every_budget_can_be_met(schedule):
    "An estimate that runs out of time does not come to each of them"
    from kdfast.experiments.spec import conv_of, network_of, student_at
    wanted = {(o.student,o.conv,o.params) for t in map(table_of, ('substitutions','compression','budget-1mb')) for o in t.runs(schedule) if o.params}
    for student,conv,params in wanted: assert student_at(network_of(student, 32), conv and conv_of(conv), params)[1]
    assert len(wanted)>10

@pytest.mark.slow
def test_estimates_are_of_the_right_size():
    "Against a run of this process; both are noisy"
    run = Run(student='wrn-16-2', epochs=1, pct=.5)
    start = time.perf_counter()
    do_run(run)
    took = time.perf_counter()-start
    assert took/8 < 60*estimate([run]).minutes[0]+1 < took*8

# --- what is published and committed

def test_published_figures():
    "Some of each table, read from the reference"
    at = lambda table,row,arm: research[table].published[row][arm]
    assert (at('moonshine', '40-2 DW', 'AT6+KD'),at('best-teacher', '16-2 3x3', 'AT+KD'),at('best-teacher', '40-1 3x3', 'AT6'))==(93.84, 94.12, 94.56)
    assert (at('sanity', '16-1 from 40-1', 'AT'),at('sanity', '16-2 from 40-2', 'teacher'),at('taps', '40-1 DW', 'AT18'))==(91.81, 94.94, 91.34)
    assert at('imagenet', 'ResNet-34 DW', 'AT')==pytest.approx(100-30.16) and at('stagewise', 'plain CNN', '5 maps')==87.24
    assert (at('teachers', 'strong', 'KD'),at('budget-1mb', 'two groups', 'alone'),at('substitutions', 'hashed', 'KD+AT'))==(84.73, 78.59, pytest.approx(100-7.47))

def test_cifar_100_as_published():
    table = research['cifar100']
    assert len(table.rows)==13 and all(set(table.published[o])=={'teacher', *table.arms} for o in table.rows)
    assert [table.published['resnet8x4 from resnet32x4'][o] for o in ('teacher','alone','KD','CRD')]==[79.42, 72.5, 73.33, 75.51]
    runs = {str(o.student):o for o in table.runs('full')}
    lr = [runs['cifar-vgg8'].lr*.1**sum(e/240>=o for o in runs['cifar-vgg8'].steps) for e in (149, 150, 180, 210)]
    assert lr==pytest.approx([.05,.005,.0005,.00005]) and runs['cifar-vgg8'].drop==.1 and runs['cifar-vgg8'].bs==64
    assert (runs['cifar-mobilenetv2'].lr,runs['cifar-mobilenetv2'].teacher.lr)==(.01, .05)

@pytest.mark.slow
@pytest.mark.parametrize('row', research['cifar100'].rows)
def test_every_method_of_cifar_100_takes_a_step(row, quiet):
    "All of a row's terms at once, over 100 classes"
    run = table_of('cifar100').runs('full', [row], ['KD'])[-1]
    x,y = torch.randint(256, (16,3,32,32), dtype=torch.uint8),[f'{i%100:02}' for i in range(16)]
    dls = tensor_dls((x,y), (x[:2],y[:2]), bs=8)
    teacher,student = (network_of(o)(n_out=16) for o in (run.teacher.student,run.student))
    cbs = [o for arm,method in table_of('cifar100').arms.items() if arm!='alone' for o in terms_of(method)]
    learn = quiet(distill_learner(dls, teacher, student, cbs=cbs), 1)
    assert all(isinstance(o.layers, dict) or o.column=='kd' for o in cbs)
    assert np.isfinite(learn.recorder.history[[o.column for o in cbs]].values).all()

def test_the_full_schedule_is_the_published_one():
    run = table_of('sanity').runs('full')[0]
    lr = [run.lr*run.drop**sum(e/200>=o for o in run.steps) for e in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert lr==pytest.approx([.1,.1,.02,.02,.004,.004,.0008,.0008]) and (run.epochs,run.bs,run.wd,run.bf16,run.pct)==(200,128,5e-4,False,1.)
    run = table_of('imagenet').runs('full')[0]
    assert [run.lr*run.drop**sum(e/100>=o for o in run.steps) for e in (29, 30, 60, 99)]==pytest.approx([.1,.01,.001,.0001]) and (run.epochs,run.bs,run.wd)==(100,256,1e-4)

def test_stages_have_one_cycle_where_others_have_steps():
    "At the published schedule, which has none for them"
    runs = table_of('methods-cifar10').runs('full')
    staged = [o for o in runs if 'two-stages' in o.method]
    assert len(staged)==4 and all((o.steps,o.lr,o.wd,o.epochs)==((),1e-2,None,200) for o in staged)
    assert all(o.steps==(.3,.6,.8) and o.lr==.1 for o in runs if o not in staged)

def test_the_late_arm_is_late():
    late, = table_of('imagenet').runs('full', ['ResNet-18'], ['AT late'])[1:]
    from kdfast.experiments.spec import terms_of
    term, = terms_of(late.method)
    assert (term.weight(.59),term.weight(.61))==(0., 1e3)

committed = sorted((root/'results/tables').glob('*.md'))

@pytest.fixture(scope='module')
def records():
    assert (store := Records(root/'results/records.jsonl')).results()
    return store

def test_a_table_reads_the_records_once(records, monkeypatch):
    parsed,of_json = [],json.loads
    monkeypatch.setattr('kdfast.experiments.records.json.loads', lambda *args: parsed.append(1) or of_json(*args))
    research['sanity'].markdown(records, 'cpu')
    assert len(parsed)==len(records.lines)

def test_lines_are_taken_all_or_none(tmp_path, monkeypatch):
    lines = (root/'results/records.jsonl').read_text().splitlines()
    (tmp_path/'few.jsonl').write_text('\n'.join(lines[:20]))
    (tmp_path/'broken.jsonl').write_text('\n'.join([*lines[:20],lines[20][:-9]]))
    store,written,whole = Records(tmp_path/'records.jsonl'),[],records_module.whole_file
    with pytest.raises(ValueError, match='broken.jsonl does not hold JSON lines of runs'): store.take(tmp_path/'broken.jsonl')
    assert not store.results() and not store.file.exists()
    monkeypatch.setattr(records_module, 'whole_file', lambda dest: written.append(dest) or whole(dest))
    assert store.take(tmp_path/'few.jsonl')==20==len(store.results()) and store.take(tmp_path/'few.jsonl')==0 and len(written)==1
    assert store.file.read_text().splitlines()==lines[:20]

@pytest.mark.parametrize('file', committed, ids=lambda f: f.stem)
def test_committed_tables_are_those_of_the_committed_records(file, records):
    name,schedule = file.stem.rsplit('-', 1)
    assert schedule!='smoke' and research[name].markdown(records, schedule)==file.read_text()
    cells = pd.read_csv(file.with_suffix('.csv'))
    pd.testing.assert_frame_equal(cells, research[name].cells(records, schedule), check_dtype=False)

def test_the_page_of_results_is_that_of_the_records():
    "Its kept outputs have every row of every committed table"
    cells = json.loads((root/'nbs/explanation/results.ipynb').read_text())['cells']
    shown = ''.join(''.join(o['data'].get('text/markdown', '')) for c in cells for o in c.get('outputs', ()) if 'data' in o).splitlines()
    lines = [o for file in committed for o in file.read_text().splitlines() if o.startswith('| ') or '`kdfast table' in o]
    assert len(lines)>100 and [o for o in lines if o not in shown]==[]

def test_there_are_committed_tables(): assert {'sanity-cpu','stagewise-cpu'} <= {f.stem for f in committed}

def test_committed_records_name_their_commands(records):
    for run in records.results():
        result = records.get(run)
        assert result.get('command') or result['commit'], run
        assert run.chain or abs(result['accuracy']-result['history']['accuracy'][-1])<1e-3, run

def test_committed_teachers_are_those_that_taught(records):
    taught = {run.teacher for run in records.results() if run.teacher and run.data=='cifar10' and run.teacher.epochs==12}
    for run in taught:
        net = network_at(run, digits_dls(8))
        about = load_network(net, root/f'results/teachers/{run.data}-{run.student}-{run.key}.pth')
        assert records.get(run)['weights']==digest(net) and about['key']==run.key
