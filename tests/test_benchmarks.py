"The benchmarks compare equal work, and say nothing where it is not"
import math, importlib.util, json, shlex, signal, sys, pytest, warm
from argparse import Namespace
from pathlib import Path
from fastai.vision.all import *
from kdfast.all import *
from kdfast.teacher import shares
from kdfast.experiments.records import read_results
from kdfast.experiments.research import research
from kdfast.layers.cut import PartOf

def script(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent/f'benchmarks/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

bench,block_cost,conv_cost,int8_cost,scaling = map(script, ('bench','block_cost','conv_cost','int8_cost','scaling'))
results = Path(__file__).parent.parent/'results'

@pytest.fixture
def work(): return bench.Work('small', wrn(16, 2), wrn(10, 1), 32, 32, ['group1','group2','group3'])

@pytest.mark.slow
@pytest.mark.parametrize('method', bench.methods)
def test_gradients_are_those_of_the_loop(work, method): assert bench.gradient_error(work, method)<1e-5

@pytest.mark.slow
@pytest.mark.parametrize('name', ['kd_loss','at_loss','hint_loss'])
def test_it_refuses_to_print_where_they_are_not(name, work, monkeypatch, capsys):
    "The loop is given another loss than kdfast has"
    right = getattr(bench, name)
    monkeypatch.setattr(bench, 'works', lambda: [work])
    monkeypatch.setattr(bench, 'methods', {k:v for k,v in bench.methods.items() if k==dict(kd_loss='KD', at_loss='AT', hint_loss='FitNet')[name]})
    monkeypatch.setattr(bench, name, lambda *args: 1.001*right(*args))
    with pytest.raises(SystemExit, match='gradients differ'): bench.main(['--turns','1','--steps','1','--parts','step'])
    assert not capsys.readouterr().out

@pytest.mark.slow
def test_each_way_trains_and_kdfast_takes_no_memory_of_its_own(work):
    ways = bench.step_ways(work, 'KD+AT')
    memory = {k:bench.peak(f, work.device) for k,f in ways.items() if k!='kdfast, compiled'}
    assert memory['kdfast']<1.1*memory['loop by hand'] and memory['plain student']<memory['loop by hand']<memory['fasterai']
    times = bench.interleaved({k:ways[k] for k in memory}, 1, 1, work.device)
    lines = bench.markdown(bench.rows('step', 'small', times, 'loop by hand', memory, ('plain student','teacher forward'))).splitlines()
    assert len(lines)==2+len(memory) and all(line.count('|')==9 for line in lines)

@pytest.mark.slow
def test_the_parts_on_small_work(work, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, 'works', lambda: [work])
    monkeypatch.setattr(bench, 'imports', lambda turns: {'fastai.vision.all':[2.], 'and kdfast.all':[2.5]})
    rows = [*bench.start_part(1)]
    assert [round(o['ratio'], 2) for o in rows[:2]]==[1,1.25] and rows[3]['ratio']>1

@pytest.mark.slow
def test_shares_are_measured_in_every_step_of_their_part(work, monkeypatch):
    "And in none where the weights are fixed"
    measured = []
    monkeypatch.setattr(bench, 'works', lambda: [work])
    monkeypatch.setattr('kdfast.teacher.callback.measure', lambda *args: measured.append(args) or shares.measure(*args))
    assert [o['who'] for o in bench.share_part(6, 1)]==['fixed weights','every step measured']*2 and len(measured)==12

@pytest.fixture
def committed(): return json.loads((results/'bench.json').read_text())

def rows_of(committed, part, work): return {o['who']:o for o in committed['rows'] if o['part']==part and work in o['work']}

@pytest.mark.parametrize('work', ['WRN-40-2 to WRN-16-1, 32 px, KD+AT','ResNet-34 to ResNet-10, 128 px, KD+AT'])
def test_a_step_keeps_the_promise(work, committed):
    "No slower than the loop by hand, with a teacher in int8 less than half its overhead"
    rows = rows_of(committed, 'step', work)
    assert rows['kdfast']['ratio']<=1.05 and rows['fasterai']['ratio']>1.3 and rows['torchdistill']['ratio']>=.95*rows['kdfast']['ratio']
    assert rows['kdfast, int8']['above']<=.45 and ('bfloat16 not native' in committed['where'] or rows['kdfast']['above']<=.6)

def test_other_parts_keep_the_promise(committed):
    cached,taps,imports = (rows_of(committed, *o) for o in (('cached epoch','float32'),('growth','taps'),('start','import')))
    assert cached['KD, cached']['ratio']<=1.05 and cached['KD+AT, cached']['ratio']<=1.1<cached['KD+AT']['ratio']
    assert taps['AT, 18 taps']['ratio']-taps['AT, 3 taps']['ratio']<=.5 and imports['and kdfast.all']['ms']-imports['fastai.vision.all']['ms']<=300
    assert {o['part'] for o in committed['rows']}=={'step','epoch','cached epoch','start','growth','floor'}

def test_bench_md_is_of_the_same_rows(committed):
    assert (results/'bench.md').read_text()==f"{committed['where']}\n\n{bench.markdown(committed['rows'])}\n"

@pytest.fixture
def stages():
    teacher,student,batch = wrn(16, 1),wrn(10, 1),(torch.randn(4, 3, 32, 32),torch.randint(0, 10, (4,)))
    return student,teacher,find_blocks(distill_learner(block_cost.loaders(batch, 1), teacher, student, loss_func=CrossEntropyLossFlat())),batch

@pytest.mark.slow
def test_block_gradients_are_those_of_whole_networks(stages): assert block_cost.gradient_error(*stages)<1e-5

@pytest.mark.slow
def test_it_sees_block_gradients_that_are_not(stages, monkeypatch, capsys):
    "A student of which the blocks before are left in training"
    train = PartOf.train
    def all_of_it(self, mode=True): return nn.Module.train(self, mode)
    monkeypatch.setattr(PartOf, 'train', all_of_it)
    assert block_cost.gradient_error(*stages)>1e-5
    monkeypatch.setattr(block_cost, 'gradient_error', lambda *_: 1e-3)
    with pytest.raises(SystemExit, match='nothing to compare'): block_cost.main(['--size','32','--bs','2'])
    assert '|' not in capsys.readouterr().out

@pytest.mark.slow
def test_every_stage_is_timed(stages):
    names = ['group1','group2','group3','classifier']
    lines = block_cost.table(block_cost.measure(block_cost.ways(*stages), 2, 1), names).splitlines()
    assert [o.split('|')[1].strip() for o in lines[2:6]]==names and len(lines)==9 and all(o.count('|')==7 for o in lines)

def test_the_committed_table_of_blocks_keeps_the_promise():
    text = (Path(__file__).parent.parent/'results/block_cost.md').read_text()
    totals = [r.split('|') for r in text.splitlines() if r.startswith('| all 6 stages')]
    assert len(totals)==2 and all(float(r[4])<=.6 for r in totals)

@pytest.mark.slow
@pytest.mark.parametrize('name', conv_cost.kinds)
def test_convolutions_are_those_written_by_hand(name): assert conv_cost.largest_error(name, conv_cost.kinds[name])<1e-4

@pytest.mark.slow
def test_it_refuses_convolutions_that_are_not(monkeypatch, capsys):
    monkeypatch.setitem(conv_cost.kinds, 'Dilated2x2', Full)
    with pytest.raises((SystemExit,RuntimeError)): conv_cost.main(['--turns','1'])
    assert '|' not in capsys.readouterr().out

@pytest.mark.slow
def test_convolutions_are_timed():
    rows = {**conv_cost.measure(1, ['Separable']), **conv_cost.measure_hashed(1, ((8,8),))}
    assert [*rows]==['Separable','8 channels, 8 px'] and all(r>0 and a>0 and b>0 for r,a,b in rows.values())

def test_the_committed_table_of_convolutions_keeps_the_promise():
    rows = {r.split('|')[1].strip(): float(r.split('|')[4]) for r in (Path(__file__).parent.parent/'results/conv_cost.md').read_text().splitlines() if r.startswith('|') and r.count('.')>2}
    hashed = {k:v for k,v in rows.items() if ' px' in k}
    assert {*rows}-{*hashed}=={*conv_cost.kinds} and max(rows.values())<=1.5 and len(hashed)==3 and max(hashed.values())<=1.3

@pytest.mark.slow
def test_int8_has_one_row_a_form(monkeypatch, capsys):
    monkeypatch.setattr(int8_cost, 'networks', {'small':(partial(wrn, 10, 1), 32)})
    int8_cost.main(['--turns','1'])
    rows = [o.split('|') for o in capsys.readouterr().out.splitlines() if o.startswith('| small')]
    assert [o[2].strip() for o in rows]==['float32','bfloat16','int8','float32, onnxruntime','int8, onnxruntime'] and all(float(o[4])>0 and float(o[6])>0 for o in rows)

@pytest.mark.slow
def test_int8_says_nothing_of_another_network(monkeypatch, capsys):
    monkeypatch.setattr(int8_cost, 'networks', {'small':(partial(wrn, 10, 1), 32)})
    monkeypatch.setattr(int8_cost, 'quantize', lambda net,dls,n: (quantize(wrn(10, 1).eval(), dls, n)[0], None))
    with pytest.raises(SystemExit, match='int8 differs from float32'): int8_cost.main(['--turns','1'])
    assert not capsys.readouterr().out

def test_the_committed_table_of_int8():
    rows = [o.split('|') for o in (Path(__file__).parent.parent/'results/int8_cost.md').read_text().splitlines() if '| int8 |' in o]
    assert len(rows)==4 and all(float(o[7])>1.2 and float(o[8])<.2 for o in rows)

@pytest.mark.slow
def test_deployed_files_have_a_row_each_or_the_reason_why_not(monkeypatch, capsys):
    deploy_cost = script('deploy_cost')
    monkeypatch.setattr(deploy_cost, 'networks', {'small':(partial(wrn, 10, .5), 2, 1e-2), 'left out':(wrn, 1, 1.)})
    monkeypatch.setattr(deploy_cost, 'forms', {'ONNX':('full.onnx',{}), 'ONNX, int8':('int8.onnx',dict(int8=True)), 'OpenVINO, int8':('int8.xml',dict(int8=True))})
    deploy_cost.main(['--turns','1','--only','small'])
    said = capsys.readouterr().out
    rows = [[c.strip() for c in o.split('|')[2:-1]] for o in said.splitlines() if o.startswith('| small')]
    assert '--turns 1 --only small`' in said and 'left out' not in said and [o[0] for o in rows]==['OpenVINO, int8','ONNX','ONNX, int8'] and 'written in floating point' in rows[0][1]
    assert all(float(o[2])>0 and float(o[4])>0 and 80<=float(o[6])<=100 and 10<=float(o[7])<=100 for o in rows[1:]) and float(rows[1][6])==100

def test_the_committed_table_of_deployed_files():
    "A file that learn.deploy has written answers as the student does"
    lines = (results/'deploy_cost.md').read_text().splitlines()
    rows = {tuple(c.strip() for c in o.split('|')[1:3]):[float(c) for c in o.split('|')[3:-1]] for o in lines if o.count('|')==10 and '.' in o}
    least = {'ONNX, int8 by learn.quantize':95, 'ONNX, int8':95, 'ExecuTorch, int8':95}
    assert len(rows)==30 and all(o[5]>=least.get(form, 99.8) for (_,form),o in rows.items())

def test_hours_of_tables(tmp_path):
    script('hours').main(['--tables','sanity,budget-1mb','--schedules','smoke','--limit','.1','--out',str(tmp_path)])
    table = pd.read_csv(tmp_path/'hours.csv')
    assert [*table.table]==['sanity','budget-1mb'] and [*table.runs]==[10,3] and table['smoke, hours'].between(0, 5).all() and table.measured.str.match(r'20\d\d-').all()

def test_the_committed_hours_are_of_every_table(): assert {*pd.read_csv(results/'hours.csv').table}=={*research}

# The script for a GPU

@pytest.fixture
def gpu_script(tmp_path, monkeypatch, capsys):
    "Runs it, its parts in processes that have imported everything: its exit code, its record and what it printed"
    gpu,python,ended = script('gpu'),tmp_path/'python',signal.getsignal(signal.SIGTERM)
    python.write_text(f'#!/bin/sh\nexec {shlex.join(warm.command())} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(python))
    def run(*args):
        code,out = 0,tmp_path/'out'
        try: gpu.main(['--device','cpu','--tiny','--out',str(out),*args])
        except SystemExit as e: code = e.code
        return code,json.loads((out/'gpu.json').read_text()),capsys.readouterr().out
    yield run
    signal.signal(signal.SIGTERM, ended)

@pytest.mark.slow
def test_the_gpu_script_leaves_one_record(gpu_script, tmp_path):
    code,record,printed = gpu_script()
    out = tmp_path/'out'
    assert code==0, printed
    rows = {o['name']:{' '.join(str(r[k]) for k in ('who','what') if k in r):r for r in o['rows']} for o in record['parts']}
    assert {o['state'] for o in record['parts']}=={'done'} and [*rows]==['environment','machine','tests','step','methods','loader','compiled','sanity']
    assert len(rows['tests'])>3 and {o['value'] for o in rows['tests'].values()}=={'passed'}
    assert {'kdfast','loop by hand','torchdistill','fasterai'} <= {*rows['step']} and 'kdfast, compiled' in rows['compiled'] and all(math.isfinite(o['ms']) for o in rows['step'].values() if 'ms' in o)  # between one step and three, less than nothing beside other work
    assert all(r['waits']==rows['methods']['plain learner']['waits'] for r in rows['methods'].values()) and rows['methods']['crd']['mb']>0
    assert printed.strip() in (out/'gpu.md').read_text() and '| tests | passed | ' in printed
    assert [*rows['sanity']]==[*map(str, read_results(out/'sanity.jsonl'))] and len(rows['sanity'])==3 and len([*out.glob('*.pth')])==1

@pytest.mark.slow
def test_the_gpu_script_tells_what_it_has_not_done(gpu_script, tmp_path):
    "A part that fails, one that hangs, one for which no time is left, a test that is red"
    gpu,rows,args = script('gpu'),[],Namespace(device='cpu', tiny=True, out=tmp_path, cifar=None)
    state,error = gpu.run('no such part', args, 60, gpu.environment(args), rows.append)
    assert state.startswith('failed') and 'no such part' in error and not rows
    assert gpu.run('step', args, .5, gpu.environment(args), rows.append)==('out of time',None)
    code,record,printed = gpu_script('--minutes', '.01', '--parts', 'machine,step')
    assert code and record['parts'][2]['state']=='not run, no time left' and '| step | not run, no time left | 0 s |' in printed
    seen = []
    gpu.Told(seen.append).pytest_runtest_logreport(Namespace(outcome='failed', failed=True, when='setup', longreprtext='why', nodeid='a.py::b'))
    assert seen==[dict(what='b', value='failed', log='why')]
