"The demo runs, and the records that the commands have left are what the issue of their runs asked for"
import json, math, shlex, subprocess, sys, pytest
from pathlib import Path
from statistics import mean, stdev

root = Path(__file__).parent.parent
arms = 'control','kd','at','kd+at','fitnet'
records = [f for f in (root/'demo/record.json', root/'results/demo/record.json', root/'results/imagenette/record.json') if f.exists()]

@pytest.mark.slow
def test_the_demo_writes_what_it_says(tmp_path):
    args = [Path(sys.executable).parent/'kdfast', 'demo', '--out', tmp_path/'out', '--epochs', '1', '--teacher-epochs', '1', '--seeds', '2']
    res = subprocess.run(args, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert res.returncode==0, res.stderr
    assert {o.name for o in (tmp_path/'out').iterdir()}=={'record.json','runs.csv','curves.png','attention.png',*(f'student-{o}.pkl' for o in arms)}
    assert all(str(o) in res.stdout for o in (tmp_path/'out').iterdir())
    record = json.loads((tmp_path/'out/record.json').read_text())
    assert record['settings']==dict(demo=True, epochs=1, teacher_epochs=1) and len(record['runs'])==2*5 and '--seeds 2' in record['command']
    assert all(len(r['history']['accuracy'])==1 for r in record['runs'])
    from fastai.vision.all import load_learner, torch
    assert load_learner(tmp_path/'out/student-kd+at.pkl').model(torch.zeros(2,3,32,32)).shape==(2,10)

@pytest.mark.parametrize('file', records, ids=lambda f: str(f.relative_to(root)))
def test_kd_is_better_than_the_control(file):
    runs = json.loads(file.read_text())['runs']
    kd,control = ([r['accuracy'] for r in runs if r['arm']==arm] for arm in ('kd','control'))
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
    record,(arms,seen,images,epochs) = json.loads((root/f'results/{name}/record.json').read_text()),asked[name]
    runs = [r['arm'] for r in record['runs']]
    assert all(runs.count(arm)>=n for arm,n in arms.items())
    assert record['teacher']['images']==seen and record['settings']['images']['training']==images
    assert all(len(r['history']['accuracy'])==record['settings']['epochs']>=epochs and r['history']['accuracy'][-1]==r['accuracy'] for r in record['runs'])
    assert record['settings']['bf16'] and (record['teacher']['training']['epochs']>=15 or name=='teacher-weak')

@pytest.mark.parametrize('name', ['imagenette','residual_cnn-20','plain_cnn-20','resnet10-10'])
def test_the_teacher_of_imagenette_is_five_points_ahead(name):
    record = json.loads((root/f'results/{name}/record.json').read_text())
    assert record['teacher']['accuracy'] - mean(r['accuracy'] for r in record['runs'] if r['arm']=='control') > .05

def test_one_teacher_taught_all_of_imagenette():
    others = 'teacher-weak','vgg'
    read = {f.parent.name: json.loads(f.read_text()) for f in root.glob('results/**/record.json') if f.parent.name not in others}
    assert len({o['teacher']['weights'] for o in read.values() if o['settings'].get('data')=='imagenette'})==1

@pytest.mark.parametrize('file', sorted(root.glob('results/cheap-*/*/record.json')), ids=lambda f: '/'.join(f.parts[-3:-1]))
def test_students_keep_their_budget(file):
    "All but the shallowest network that there is, at three times the budget"
    record = json.loads(file.read_text())
    budget,n = dict(zip(('cheap-100k','cheap-300k'), (100_000,300_000)))[file.parts[-3]],record['costs']['student']['parameters']
    if file.parts[-2]=='depth': assert 'conv' not in record['settings'] and n<1.02*budget
    else: assert record['settings']['params']==budget and .95*budget<n<=budget and len(record['setting'])==1

importances = 'l1','l2','taylor','scale','random'
chains = dict(prune=[f'prune:{r}:{o}' for r in ('.25','.5','.75') for o in importances], factorize=[f'factorize:energy={e}{form}' for e in ('.9','.8','.7','.5') for form in ('',':tucker')], compress=['prune:.5,factorize:.7'])
chains['prune-labels'] = [f'prune:{r}:l2' for r in ('.25','.5','.75')]

@pytest.mark.parametrize('kind', ['full','grouped','separable'])
def test_networks_of_a_megabyte(kind):
    record = json.loads((root/f'results/budget-1mb/{kind}/record.json').read_text())
    assert .2e6<record['costs']['student']['parameters']<=250_000==record['settings']['params'] and record['settings']['student']=='mobile'

piped = dict(pipeline=['prune:params=2130000','factorize:params=2130000','prune:.25,factorize:.7,int8','prune:.5,factorize:.7,int8','int8','int8:aware'], vgg=['prune:.5,factorize:.6,int8'])

@pytest.mark.parametrize('name', piped)
def test_records_of_pipelines(name):
    record = json.loads((root/f'results/{name}/record.json').read_text())
    runs = {r['arm']:r for r in record['runs']}
    assert {*runs}>={*piped[name]} and record['settings']['bf16'] and record['teacher']['images']==9469
    for arm,r in runs.items():
        assert [o['step'] for o in r['report']]==['as it was',*arm.split(','),'onnx'] and abs(r['accuracy']-r['report'][-2]['accuracy'])<1e-8
        start,end = r['report'][0],r['report'][-2]
        assert end['MB on disk']<.3*start['MB on disk'] and end['ms of 64']<start['ms of 64'] and abs(start['accuracy']-record['teacher']['accuracy'])<.01

@pytest.mark.parametrize('name', chains)
def test_records_of_compression(name):
    record = json.loads((root/f'results/{name}/record.json').read_text())
    assert {r['arm'] for r in record['runs']}>={*chains[name]} and record['settings']['images']['training']==1894 and record['teacher']['images']==9469
    for r in record['runs']:
        assert r['parameters']==record['costs'][r['arm']]['parameters']<record['costs']['teacher']['parameters'] and r['accuracy']>r['before']
        assert len(r['steps'])==r['arm'].count(',')+1 and (set(r['history'])=={'train_loss','valid_loss','accuracy'})==(name=='prune-labels')

def test_a_teacher_is_kept():
    "The weights that the record names, in half precision"
    from kdfast.core import digest
    from kdfast.experiments.results import load_network
    from kdfast.models.nets import wrn
    net,record = wrn(16, 2),json.loads((root/'results/cifar10/record.json').read_text())
    load_network(net, root/'results/teachers/cifar10-wrn-16-2.pth')
    assert digest(net)==record['teacher']['weights']

@pytest.mark.parametrize('file', sorted(root.glob('results/**/record.json')), ids=lambda f: str(f.parent.relative_to(root/'results')))
def test_commands_on_record_are_commands(file):
    from kdfast.cli import _parser, compress, demo, distill
    record = json.loads(file.read_text())
    name,*args = shlex.split(record['command'])
    parsed = vars(_parser(dict(demo=demo, distill=distill, compress=compress)).parse_args(args))
    assert name=='kdfast' and all(parsed.get(k, v)==v for k,v in record['settings'].items())

def test_there_is_a_record(): assert len(records)>=2
