"`kdfast compress`"
import json, pytest
from fastai.vision.all import *
from kdfast.all import *
from kdfast.cli import main
from kdfast.experiments import load_network

quick = '--teacher wrn-10-1 --teacher-epochs 4 --epochs 3 --lr 1e-2'.split()
chains = 'prune:.5,factorize:.7,int8;prune:params=30000:taylor'

def record_of(out): return json.loads((out/'record.json').read_text())

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'out'
    main(['compress', *quick, '--steps', chains, '--out', str(out)])
    return out

def test_what_it_leaves(done):
    record = record_of(done)
    first,second = record['runs']
    assert [first['arm'],second['arm']]==chains.split(';') and len(first['steps'])==2 and len(second['steps'])==1
    assert first['parameters']<second['parameters']<=30_000<record['costs']['teacher']['parameters']==count_params(wrn(10, 1))
    for r in (first,second):
        assert record['costs'][r['arm']]['parameters']==r['parameters'] and record['costs'][r['arm']]['MACs']==r['MACs']<record['costs']['teacher']['MACs']
        assert list(r['history'])[3:]==['kd'] and len(r['history']['accuracy'])==3
    assert first['accuracy']>first['before'] and second['accuracy']>second['before']
    assert {o.name for o in done.iterdir()}=={'record.json','runs.csv','curves.png','teacher.pth','student-prune-.5-factorize-.7.pkl','student-prune-params-30000-taylor.pkl'}
    net = wrn(10, 1)
    load_network(net, done/'teacher.pth')
    pruned,_ = prune_channels(net, 32, ratio=.5)
    assert Learner(digits_dls(), pruned, metrics=accuracy).validate()[1]==pytest.approx(first['steps'][0], abs=1e-6)
    table = result_table(record)
    assert [*table.index]==['teacher',*chains.split(';')] and 'against control (points)' not in table

def test_what_it_leaves_predicts(done):
    record,dls = record_of(done),digits_dls()
    for file,run in zip(('student-prune-.5-factorize-.7.pkl','student-prune-params-30000-taylor.pkl'), record['runs']):
        net = load_learner(done/file).model
        assert Learner(dls, net, metrics=accuracy).validate()[1]==pytest.approx(run['accuracy'], abs=1e-6) and count_params(net)==run['parameters']

def test_it_goes_on(done, tmp_path, capsys):
    out = shutil.copytree(done, tmp_path/'out')
    before = record_of(out)['runs']
    main(['compress', *quick, '--steps', 'factorize:.5:tucker', '--out', str(out)])
    record = record_of(out)
    assert record['runs'][:2]==before and record['runs'][2]['arm']=='factorize:.5:tucker' and f"'{chains};factorize:.5:tucker'" in record['command']
    assert {*record['costs']}=={'teacher',*chains.split(';'),'factorize:.5:tucker'}
    with pytest.raises(SystemExit) as e: main(['compress', *quick, '--steps', chains, '--method', 'control', '--out', str(out)])
    assert 'holds the results of other settings (method kd, not control)' in str(e.value)

def test_labels_alone(done, tmp_path):
    main(['compress', *quick, '--steps', 'prune:.5', '--method', 'control', '--teacher-file', str(done/'teacher.pth'), '--out', str(tmp_path/'out')])
    run, = record_of(tmp_path/'out')['runs']
    assert list(run['history'])==['train_loss','valid_loss','accuracy']

bad = {'shrink:.5':"Unknown step 'shrink': choose from prune, factorize", 'prune':'is written as prune:.5', 'prune:.5:l3':"names 'l3': choose from l1, l2", 'prune:energy=.5':'prune takes ratio, params, macs', 'factorize:x':'is no number',
    'prune:1.5':'between 0 and 1, got 1.5', 'prune:.99':'would leave none', 'prune:params=10':'The budget of 10 is out of reach', 'factorize:energy=2':'energy is above 0', 'prune:.5,factorize:params=1':'out of reach: factorized'}

@pytest.mark.parametrize('steps', bad)
def test_bad_steps(steps, tmp_path, monkeypatch):
    "Found before anything is trained"
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('trained'))
    with pytest.raises(SystemExit) as e: main(['compress', '--teacher', 'wrn-10-1', '--steps', steps, '--out', str(tmp_path/'out')])
    assert bad[steps] in str(e.value)

@pytest.mark.parametrize('args,message', [(['--method','blocks'], 'trains block by block'), (['--method','magic'], 'Unknown method magic'), (['--epochs','0'], '--epochs is at least 1'), (['--method','fitnet'], 'take one step a chain')])
def test_bad_arguments(args, message, done, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('trained'))
    with pytest.raises(SystemExit) as e: main(['compress', '--teacher', 'wrn-10-1', '--teacher-file', str(done/'teacher.pth'), '--out', str(tmp_path/'out'), *args])
    assert message in str(e.value)
