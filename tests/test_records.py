"The demo runs, and the records that the commands have left are what the issue of their runs asked for"
import math, os, re, shlex, shutil, subprocess, sys, pytest, warm
from pathlib import Path
from statistics import mean, stdev
from kdfast.experiments.records import read_results
from kdfast.experiments.results import arms_of, by_arm, label_of, teachers_of
from kdfast.experiments.spec import as_published

root = Path(__file__).parent.parent
arms = 'control','kd','at','kd+at','fitnet'
records = [f for f in (root/'demo/records.jsonl', root/'results/demo/records.jsonl', root/'results/imagenette/records.jsonl') if f.exists()]
folders = sorted(f.parent for f in root.glob('results/**/records.jsonl') if f.parent!=root/'results')

def results_of(name): return read_results(root/f'results/{name}/records.jsonl')

def teacher_of(results):
    (run,result), = teachers_of(results).items()
    return run,result

@pytest.mark.slow
def test_the_demo_writes_what_it_says(tmp_path):
    args = [Path(sys.executable).parent/'kdfast', 'demo', '--out', tmp_path/'out', '--epochs', '1', '--teacher-epochs', '1', '--seeds', '2']
    res = subprocess.run(warm.command(*args), capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert res.returncode==0, res.stderr
    shown = {'records.jsonl','curves.png','attention.png',*(f'student-{o}.pkl' for o in arms)}
    assert all((tmp_path/'out'/o).exists() and str(tmp_path/'out'/o) in res.stdout for o in shown)
    assert all(o in res.stdout for o in ('attention.png   ', 'where teacher, student and control look', '\nat       Attention transfer', '\nkd+at    kd and at together\n'))
    *_,command,_,last = res.stdout.rstrip().splitlines()
    assert last.startswith('Next, ') and re.match(r'A student without fastai and torch: \S*python3? -m kdfast.predict ', command)
    (tmp_path/'sitecustomize.py').write_text('import sys\nsys.modules.update(torch=None, fastai=None)')
    res = subprocess.run([sys.executable, *command.split()[-4:]], capture_output=True, text=True, timeout=60, env={**os.environ, 'PYTHONPATH':str(tmp_path)})
    assert res.returncode==0 and f"{tmp_path/'out/digit.png'}: " in res.stdout and res.stdout.count('%')==3, res.stderr
    results = read_results(tmp_path/'out/records.jsonl')
    assert len(arms_of(results))==2*5 and all('--seeds 2' in o['command'] for o in results.values())
    assert all(len(o['history']['accuracy'])==1 for o in results.values())
    from fastai.vision.all import load_learner, torch
    assert load_learner(tmp_path/'out/student-kd+at.pkl').model(torch.zeros(2,3,32,32)).shape==(2,10)

@pytest.mark.parametrize('file', records, ids=lambda f: str(f.relative_to(root)))
def test_kd_is_better_than_the_control(file):
    accs = by_arm(read_results(file), 'accuracy')
    kd,control = (accs[arm] for arm in ('kd','control'))
    assert len(kd)==len(control)>=3
    joint = math.sqrt(sum(stdev(o)**2/len(o) for o in (kd,control)))
    assert mean(kd)-mean(control)>joint

asked = dict(imagenette=({'control':3, 'kd':3, 'at':3, 'kd+at':3, 'fitnet':3}, 9469, 1894, 20), cifar10=({'control':1, 'kd':1, 'at':1, 'kd+at':1}, 50000, 10000, 10))
asked['imagenette-all'] = ({'control':1, 'kd':1}, 9469, 9469, 20)
by_blocks = 'blocks','simultaneous','blocks-parallel'
asked['imagenette'][0].update(dict.fromkeys(by_blocks, 3))
asked['residual_cnn-20'] = ({**dict.fromkeys(['control','blocks','blocks-nostem'], 5), **dict.fromkeys(['kd','fitnet','simultaneous','blocks-parallel','blocks-pretrained','blocks-random'], 3)}, 9469, 1894, 20)
asked['plain_cnn-20'] = (dict.fromkeys(['control','kd','blocks'], 1), 9469, 1894, 20)
asked['resnet10-10'] = (dict.fromkeys(['control','kd','fitnet',*by_blocks], 3), 9469, 947, 20)
asked['resnet10-40'] = (dict.fromkeys(['control','fitnet','blocks','blocks-parallel'], 1), 9469, 3785, 20)
for o in (14,18): asked[f'resnet{o}-20'] = ({'control':1, 'kd':1, 'fitnet':1}, 9469, 1894, 20)
for kind in ('full','depth','dilated2x2','grouped','bottleneck','hashed'): asked[f'cheap-300k/{kind}'] = ({'control':1, 'kd+at':1}, 50000, 10000, 12)
for kind in ('full','depth','dilated2x2','grouped','separable','separable-linear','separablegrouped','bottleneck','separablechannelwise','shuffle','lowrank','hashed','separablehashed','acdc','tensortrain','tucker','cp'):
    asked[f'cheap-100k/{kind}'] = ({'control':1, 'kd+at':1}, 50000, 10000, 12)
for kind in ('shuffle','separablehashed'): asked.update({f'wd/{kind}{o}':({'control':3}, 50000, 5000, 12) for o in ('','-groups')})
for o in ('teacher-strong','teacher-weak'): asked[o] = ({'control':2, 'kd':2}, 9469, 1894, 20)
for o in ('separable','grouped','full'): asked[f'budget-1mb/{o}'] = ({'control':2}, 9469, 1894, 20)
for o in ('small','separable','separable-10'): asked[f'tenth/{o}'] = ({'control':1, 'kd':1}, 9469, 1894, 20)
for o in (20,26,34): asked[f'resnet{o}-20'] = ({'control':1}, 9469, 1894, 20)

@pytest.mark.parametrize('name', asked)
def test_records_on_real_images(name):
    results,(arms,seen,images,epochs) = results_of(name),asked[name]
    accs,ours = by_arm(results, 'accuracy'),arms_of(results)
    assert all(len(accs[as_published(arm)])>=n for arm,n in arms.items())
    assert {o['images']['training'] for o in ours.values()}=={images}
    assert all(len(o['history']['accuracy'])==r.epochs>=epochs and o['history']['accuracy'][-1]==o['accuracy'] and r.bf16 for r,o in ours.items())
    assert all(o['images']['training']==seen and (r.epochs>=15 or name=='teacher-weak') for r,o in teachers_of(results).items())
    assert bool(teachers_of(results))==any(arm!='control' for arm in accs)

@pytest.mark.parametrize('name', ['imagenette','residual_cnn-20','plain_cnn-20','resnet10-10'])
def test_the_teacher_of_imagenette_is_five_points_ahead(name):
    results = results_of(name)
    assert teacher_of(results)[1]['accuracy'] - mean(by_arm(results, 'accuracy')['control']) > .05

def test_one_teacher_taught_all_of_imagenette():
    others = 'teacher-weak','vgg'
    taught = [(r, o) for f in folders if f.name not in others for r,o in read_results(f/'records.jsonl').items() if r.data=='imagenette' and r.teacher]
    assert len(taught)>100 and len({o['teacher weights'] for r,o in taught})==len({r.teacher for r,o in taught})==1

@pytest.mark.parametrize('folder', [o for o in folders if o.parent.name.startswith('cheap')], ids=lambda o: '/'.join(o.parts[-2:]))
def test_students_keep_their_budget(folder):
    "All but the shallowest network that there is, at three times the budget"
    budget = {'cheap-100k':100_000, 'cheap-300k':300_000}[folder.parent.name]
    for run,o in arms_of(read_results(folder/'records.jsonl')).items():
        if folder.name=='depth': assert run.conv is None and o['parameters']<1.02*budget
        else: assert run.params==budget and .95*budget<o['parameters']<=budget and len(o['setting'])==1

importances = 'l1','l2','taylor','scale','random'
chains = dict(prune=[f'prune:{r}:{o}' for r in ('.25','.5','.75') for o in importances], factorize=[f'factorize:energy={e}{form}' for e in ('.9','.8','.7','.5') for form in ('',':tucker')], compress=['prune:.5,factorize:.7'])
chains['prune-labels'] = [f'prune:{r}:l2' for r in ('.25','.5','.75')]

@pytest.mark.parametrize('kind', ['full','grouped','separable'])
def test_networks_of_a_megabyte(kind):
    for run,o in results_of(f'budget-1mb/{kind}').items(): assert .2e6<o['parameters']<=250_000==run.params and run.student=='mobile'

piped = dict(pipeline=['prune:params=2130000','factorize:params=2130000','prune:.25,factorize:.7,int8','prune:.5,factorize:.7,int8','int8','int8:aware'], vgg=['prune:.5,factorize:.6,int8'])

@pytest.mark.parametrize('name', piped)
def test_records_of_pipelines(name):
    results = results_of(name)
    start,runs = teacher_of(results)[1],{label_of(r):o for r,o in arms_of(results).items()}
    assert {*runs}>={*piped[name]} and all(r.bf16 for r in results) and start['images']['training']==9469
    for arm,r in runs.items():
        assert [o['step'] for o in r['report']]==['as it was',*arm.split(','),'onnx'] and abs(r['accuracy']-r['report'][-2]['accuracy'])<1e-8
        before,end = r['report'][0],r['report'][-2]
        assert end['MB on disk']<.3*before['MB on disk'] and end['ms of 64']<before['ms of 64'] and abs(before['accuracy']-start['accuracy'])<.01

@pytest.mark.parametrize('name', chains)
def test_records_of_compression(name):
    results = results_of(name)
    start,runs = teacher_of(results)[1],{label_of(r):o for r,o in arms_of(results).items()}
    assert {*runs}>={*chains[name]} and {o['images']['training'] for o in runs.values()}=={1894} and start['images']['training']==9469
    for arm,o in runs.items():
        assert o['parameters']<start['parameters'] and o['accuracy']>o['before']
        assert len(o['steps'])==arm.count(',')+1 and (set(o['history'])=={'train_loss','valid_loss','accuracy'})==(name=='prune-labels')

def test_a_teacher_is_kept():
    "The weights that the record names"
    from kdfast.core import digest
    from kdfast.experiments.arm import load_network
    from kdfast.models.nets import wrn
    net,teacher = wrn(16, 2),teacher_of(results_of('cifar10'))[1]
    load_network(net, root/'results/teachers/cifar10-wrn-16-2.pth')
    assert digest(net)==teacher['weights']

@pytest.mark.parametrize('folder', folders, ids=lambda o: str(o.relative_to(root/'results')))
def test_commands_on_record_are_commands(folder):
    from kdfast.cli import _parser, compress, demo, distill
    for run,o in arms_of(read_results(folder/'records.jsonl')).items():
        name,*args = shlex.split(o['command'])
        parsed = vars(_parser(dict(demo=demo, distill=distill, compress=compress)).parse_args(args))
        if run.chain: parsed['student'] = parsed['teacher']
        assert name=='kdfast' and all(parsed.get(k, v)==v for k,v in run.settings.items() if k not in ('method','teacher','start','chain','seed'))

def test_there_is_a_record(): assert len(records)>=2

@pytest.mark.slow
def test_a_record_without_networks_is_shown(tmp_path, capsys):
    "The command of what is in the repository, in a folder that holds no more than that"
    from kdfast.cli import main
    shutil.copy(root/'results/demo/records.jsonl', tmp_path)
    main(['demo','--out',str(tmp_path)])
    out = capsys.readouterr().out
    assert '16 of 16 runs done' in out and 'kd+at' in out and not [*tmp_path.glob('student-*')]
