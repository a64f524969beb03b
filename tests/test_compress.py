"`kdfast compress`"
import pytest
import kdfast.experiments.run as run_module
from fastai.vision.all import *
from kdfast.all import *
from kdfast.cli import main
from kdfast.experiments.arm import load_network
from kdfast.experiments.checkpoint import EpochCheckpoint
from kdfast.experiments.records import read_results
from kdfast.experiments.results import arms_of, label_of, result_table, teachers_of

quick = '--pct .4 --size 16 --teacher wrn-10-1 --teacher-epochs 4 --epochs 3 --lr 1e-2'.split()
chains = 'prune:.5,factorize:.7,int8;prune:params=30000:taylor'

stems = 'student-prune-.5-factorize-.7-int8','student-prune-params-30000-taylor'

def results_of(out): return read_results(out/'records.jsonl')

def told(out):
    "Results of the chains, and of the network that they began with"
    return {label_of(r):o for r,o in arms_of(results_of(out)).items()},first(teachers_of(results_of(out)).values())

def network_of(out): return first((out/'teachers').iterdir())

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'out'
    main(['compress', *quick, '--steps', chains, '--out', str(out)])
    return out

@pytest.mark.slow
def test_what_it_leaves(done):
    arms,start = told(done)
    first,second = arms.values()
    assert [*arms]==chains.split(';')
    assert [[o['step'] for o in r['report']] for r in (first,second)]==[['as it was','prune:.5','factorize:.7','int8','onnx'],['as it was','prune:params=30000:taylor','onnx']]
    assert first['parameters']<second['parameters']<=30_000<start['parameters']==count_params(wrn(10, 1))
    for r in (first,second):
        assert all(isinstance(o, int) for o in (r['parameters'],r['MACs']))
        assert r['MACs']<start['MACs'] and r['ms per image']>0
        assert list(r['history'])[4:]==['kd'] and len(r['history']['accuracy'])==3*sum(o['before'] is not None for o in r['report'])
        assert [o['accuracy'] for o in r['report'][-2:]]==pytest.approx([r['accuracy']]*2, abs=.01) and abs(r['accuracy']-r['report'][-2]['accuracy'])<1e-8 and r['seconds']>sum(o['seconds'] for o in r['report'])-.5
        sizes = [o['MB on disk'] for o in r['report'][:-1]]
        assert sizes==sorted(sizes, reverse=True) and all(o['ms of one']>0 and o['ms of 64']>0 for o in r['report'])
    assert first['report'][1]['accuracy']>first['report'][1]['before'] and second['accuracy']>second['before']
    assert {o.name for o in done.iterdir() if o.is_file()}=={'records.jsonl','.records.jsonl.lock','report.csv','curves.png',*(f'{stem}.{o}' for stem in stems for o in ('pkl','onnx'))}
    report = pd.read_csv(done/'report.csv')
    assert [*report.chain.unique()]==chains.split(';') and len(report)==8
    net = wrn(10, 1)
    load_network(net, network_of(done))
    pruned,_ = prune_channels(net, 16, ratio=.5)
    assert Learner(digits_dls(size=16), pruned, metrics=accuracy).validate()[1]==pytest.approx(first['report'][1]['before'], abs=1e-6)
    table = result_table(results_of(done))
    assert [*table.index]==['teacher',*chains.split(';')] and 'against control (points)' not in table

@pytest.mark.slow
def test_what_it_leaves_predicts(done):
    (arms,_),dls = told(done),digits_dls(size=16)
    for stem,run in zip(stems, arms.values()):
        net,file = load_learner(done/f'{stem}.pkl').model,OnnxModel(done/f'{stem}.onnx')
        assert Learner(dls, net, metrics=accuracy).validate()[1]==pytest.approx(run['accuracy'], abs=1e-6) and count_params(net)==run['parameters']
        assert accuracy_of(file, dls)==pytest.approx(run['report'][-1]['accuracy'], abs=1e-6)

@pytest.mark.slow
def test_it_goes_on(done, tmp_path, capsys):
    out = shutil.copytree(done, tmp_path/'out')
    before,_ = told(out)
    main(['compress', *quick, '--steps', 'factorize:.5:tucker', '--out', str(out)])
    (after,_),printed = told(out),capsys.readouterr().out.split('ms per image at batch sizes')[1]
    assert {k:o['report'] for k,o in after.items() if k in before}=={k:o['report'] for k,o in before.items()}
    assert [*after]==[*before,'factorize:.5:tucker'] and all(o in printed for o in after) and printed.count('kdfast compress')==2

@pytest.mark.slow
def test_it_goes_on_after_the_last_epoch(done, tmp_path, monkeypatch, capsys):
    "Stopped in the second epoch of its second step, it trains neither the first step nor that epoch's forerunner again, and ends as it would have"
    out,seen = tmp_path/'out',[]
    args = ['compress', *quick, '--teacher-file', str(network_of(done)), '--steps', 'prune:.5,factorize:.7,int8', '--out', str(out)]
    class Watch(Callback):
        run_valid,stop,fits = False,True,0
        def before_fit(self): Watch.fits += not hasattr(self.learn, 'lr_finder')
        def after_batch(self):
            seen.append((count_params(self.learn.student), self.epoch))
            if self.stop and len({o[0] for o in seen})==2 and self.epoch==1: raise KeyboardInterrupt
    make = run_module._learner
    monkeypatch.setattr(run_module, '_learner', lambda *args, cbs=None, **kwargs: make(*args, cbs=[*L(cbs), Watch()], **kwargs))
    with pytest.raises(SystemExit) as e: main(args)
    err = capsys.readouterr().err
    assert e.value.code==130 and 'resumes after the last whole epoch' in err and err.count('Interrupted')==1
    first_step,second_step = dict.fromkeys(o[0] for o in seen)
    Watch.stop = False
    seen.clear()
    main(args)
    assert {*seen}=={(second_step,1),(second_step,2)}
    (again,_),(whole,_) = told(out),told(done)
    again,whole = again['prune:.5,factorize:.7,int8'],whole['prune:.5,factorize:.7,int8']
    rows = lambda o: [(r['step'],r['accuracy'],r['before'],r['parameters']) for r in o['report']]
    assert rows(again)==rows(whole) and again['history']==whole['history'] and not [*(out/'.checkpoints').iterdir()]

@pytest.fixture
def chain(dls, teacher):
    "A learner whose pipeline can be made anew"
    net = wrn(10, 1)
    def make(**kwargs): return distill_learner(dls, teacher, deepcopy(net), **{'metrics':accuracy, **kwargs})
    return make

def short(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)

def pruning(r): return Step(f'prune:{r}', partial(Learner.prune, ratio=r))

def test_a_pipeline_ends_as_it_would_have(chain, tmp_path):
    "Stopped in its second step, its learner carries the state of the first"
    steps,file = [pruning(.3),pruning(.3),Step('distill', noop)],tmp_path/'state.pth'
    def stop(learn): raise KeyboardInterrupt
    def done(steps, seed, **kwargs):
        learn = chain(**kwargs)
        set_seed(seed)
        learn.dls.train.rng.seed(seed)
        return pipeline(learn, steps, short)
    whole = done(steps, 3)
    with pytest.raises(KeyboardInterrupt): done([steps[0],Step('stop', stop)], 3, cbs=EpochCheckpoint(file))
    again = done(steps, 9, cbs=EpochCheckpoint(file))
    assert all(torch.equal(a, b) for a,b in zip(whole[-1].network.parameters(), again[-1].network.parameters()))
    assert [o.accuracy for o in whole]==[o.accuracy for o in again] and [o.before is None for o in whole]==[True,False,False,False]

def test_a_pipeline_needs_an_accuracy(chain):
    with pytest.raises(ValueError, match='metrics=accuracy'): pipeline(chain(metrics=error_rate), [pruning(.3)], short)
    stages = pipeline(chain(metrics=[error_rate,accuracy]), [Step('as is', noop, trains=False)], short)
    assert stages[0].accuracy==stages[1].accuracy==pytest.approx(accuracy_of(stages[0].network, chain().dls))
    with pytest.raises(ValueError, match='only prepared for int8'): pipeline(chain(), [Learner.quantize_aware], short)

@pytest.mark.slow
def test_files_on_the_way(done, tmp_path):
    "Each row of the report is of the network as it was then"
    main(['compress', *quick[:6], '--epochs', '1', '--teacher-file', str(network_of(done)), '--steps', 'onnx,prune:.5', '--out', str(tmp_path/'out')])
    arm, = told(tmp_path/'out')[0].values()
    start,first,pruned,last = arm['report']
    assert [o['parameters'] for o in (first,last)]==[o['parameters'] for o in (start,pruned)] and first['MB on disk']>2*last['MB on disk']
    assert {o.name for o in (tmp_path/'out').glob('*.onnx')}=={'student-onnx-prune-.5-1.onnx','student-onnx-prune-.5.onnx'}

@pytest.mark.slow
def test_other_steps(done, tmp_path):
    steps = 'swap:separable,program;distill:wrn-10-0.5,int8:aware;int8'
    main(['compress', *quick[:6], '--epochs', '1', '--teacher-file', str(network_of(done)), '--steps', steps, '--out', str(tmp_path/'out')])
    swapped,fresh,alone = told(tmp_path/'out')[0].values()
    assert (tmp_path/'out/student-swap-separable-program.pt2').exists() and swapped['parameters']==count_params(swap_convs(wrn(10, 1), Separable)[0])
    assert fresh['report'][1]['parameters']==count_params(wrn(10, .5)) and [o['step'] for o in fresh['report']]==['as it was','distill:wrn-10-0.5','int8:aware','onnx']
    assert alone['history']=={} and abs(alone['accuracy']-alone['report'][0]['accuracy'])<.03

@pytest.mark.slow
def test_labels_alone(done, tmp_path):
    main(['compress', *quick, '--steps', 'prune:.5', '--method', 'control', '--teacher-file', str(network_of(done)), '--out', str(tmp_path/'out')])
    run, = told(tmp_path/'out')[0].values()
    assert list(run['history'])==['train_loss','valid_loss','accuracy','top5']

bad = {'shrink:.5':"Unknown step 'shrink': choose from swap, distill, prune", 'int8,prune:.5':'is quantized', 'int8,int8':'int8 already', 'int8:aware,int8':'int8 already', 'distill:resnet11':'Unknown network', 'swap:sparable':'Unknown convolution', 'prune':'write it as prune:.5', 'prune:.5:l3':"Unknown importance 'l3': choose from l1, l2", 'prune:energy=.5':'prune has no energy: it takes ratio, params, macs', 'factorize:x':'is not a number',
    'prune:1.5':'between 0 and 1, got 1.5', 'prune:.99':'would leave none', 'prune:params=10':'The budget of 10 is out of reach', 'factorize:energy=2':'energy must be above 0', 'prune:.5,factorize:params=1':'out of reach: factorized'}

@pytest.mark.parametrize('steps', bad)
def test_bad_steps(steps, tmp_path, monkeypatch):
    "Found before anything is trained"
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('trained'))
    with pytest.raises(SystemExit) as e: main(['compress', '--teacher', 'wrn-10-1', '--steps', steps, '--out', str(tmp_path/'out')])
    assert bad[steps] in str(e.value)

@pytest.mark.parametrize('args,message', [(['--method','blocks'], 'trains block by block'), (['--method','magic'], 'Unknown method magic'), (['--epochs','0'], '--epochs must be at least 1'), (['--method','fitnet'], 'use one step per chain')])
def test_bad_arguments(args, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('trained'))
    torch.save(wrn(10, 1).state_dict(), tmp_path/'weights.pth')
    with pytest.raises(SystemExit) as e: main(['compress', '--teacher', 'wrn-10-1', '--teacher-file', str(tmp_path/'weights.pth'), '--out', str(tmp_path/'out'), *args])
    assert message in str(e.value)
