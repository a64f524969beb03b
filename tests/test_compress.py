"`kdfast compress`"
import json, pytest
from fastai.vision.all import *
from kdfast.all import *
from kdfast.cli import main
from kdfast.experiments.results import load_network, result_table

quick = '--teacher wrn-10-1 --teacher-epochs 4 --epochs 3 --lr 1e-2'.split()
chains = 'prune:.5,factorize:.7,int8;prune:params=30000:taylor'

stems = 'student-prune-.5-factorize-.7-int8','student-prune-params-30000-taylor'

def record_of(out): return json.loads((out/'record.json').read_text())

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'out'
    main(['compress', *quick, '--steps', chains, '--out', str(out)])
    return out

def test_what_it_leaves(done):
    record = record_of(done)
    first,second = record['runs']
    assert [first['arm'],second['arm']]==chains.split(';')
    assert [[o['step'] for o in r['report']] for r in (first,second)]==[['as it was','prune:.5','factorize:.7','int8','onnx'],['as it was','prune:params=30000:taylor','onnx']]
    assert first['parameters']<second['parameters']<=30_000<record['costs']['teacher']['parameters']==count_params(wrn(10, 1))
    for r in (first,second):
        assert all(isinstance(o, int) for o in (r['parameters'],r['MACs']))
        assert record['costs'][r['arm']]['parameters']==r['parameters'] and record['costs'][r['arm']]['MACs']==r['MACs']<record['costs']['teacher']['MACs']
        assert list(r['history'])[3:]==['kd'] and len(r['history']['accuracy'])==3*sum(o['before'] is not None for o in r['report'])
        assert [o['accuracy'] for o in r['report'][-2:]]==pytest.approx([r['accuracy']]*2, abs=.01) and abs(r['accuracy']-r['report'][-2]['accuracy'])<1e-8 and r['seconds']==pytest.approx(sum(o['seconds'] for o in r['report']), abs=.5)
        sizes = [o['MB on disk'] for o in r['report'][:-1]]
        assert sizes==sorted(sizes, reverse=True) and all(o['ms of one']>0 and o['ms of 64']>0 for o in r['report'])
    assert first['report'][1]['accuracy']>first['report'][1]['before'] and second['accuracy']>second['before']
    assert {o.name for o in done.iterdir()}=={'record.json','runs.csv','report.csv','curves.png','teacher.pth',*(f'{stem}.{o}' for stem in stems for o in ('pkl','onnx'))}
    told = pd.read_csv(done/'report.csv')
    assert [*told.chain.unique()]==chains.split(';') and len(told)==8
    net = wrn(10, 1)
    load_network(net, done/'teacher.pth')
    pruned,_ = prune_channels(net, 32, ratio=.5)
    assert Learner(digits_dls(), pruned, metrics=accuracy).validate()[1]==pytest.approx(first['report'][1]['before'], abs=1e-6)
    table = result_table(record)
    assert [*table.index]==['teacher',*chains.split(';')] and 'against control (points)' not in table

def test_what_it_leaves_predicts(done):
    record,dls = record_of(done),digits_dls()
    for stem,run in zip(stems, record['runs']):
        net,file = load_learner(done/f'{stem}.pkl').model,OnnxModel(done/f'{stem}.onnx')
        assert Learner(dls, net, metrics=accuracy).validate()[1]==pytest.approx(run['accuracy'], abs=1e-6) and count_params(net)==run['parameters']
        assert accuracy_of(file, dls)==pytest.approx(run['report'][-1]['accuracy'], abs=1e-6)

@pytest.mark.slow
def test_it_goes_on(done, tmp_path, capsys):
    out = shutil.copytree(done, tmp_path/'out')
    before = record_of(out)['runs']
    main(['compress', *quick, '--steps', 'factorize:.5:tucker', '--out', str(out)])
    record = record_of(out)
    assert record['runs'][:2]==before and record['runs'][2]['arm']=='factorize:.5:tucker' and f"'{chains};factorize:.5:tucker'" in record['command']
    assert {*record['costs']}=={'teacher',*chains.split(';'),'factorize:.5:tucker'}
    with pytest.raises(SystemExit) as e: main(['compress', *quick, '--steps', chains, '--method', 'control', '--out', str(out)])
    assert 'holds the results of other settings (method kd, not control)' in str(e.value)

@pytest.mark.slow
def test_it_goes_on_step_by_step(done, tmp_path, monkeypatch, capsys):
    "Stopped in its second step, it does not repeat the first, and ends as it would have"
    out,fits,fit = tmp_path/'out',[],Learner.fit_one_cycle
    args = ['compress', *quick, '--teacher-file', str(done/'teacher.pth'), '--steps', 'prune:.5,factorize:.7,int8', '--out', str(out)]
    def stop_in_the_second(learn, *args, **kwargs):
        fits.append(count_params(learn.student))
        if len(fits)==2: raise KeyboardInterrupt
        return fit(learn, *args, **kwargs)
    monkeypatch.setattr(Learner, 'fit_one_cycle', stop_in_the_second)
    with pytest.raises(SystemExit) as e: main(args)
    kept = out/'steps'/stems[0]
    told = capsys.readouterr().err
    assert 'Steps done: 1 of 4, and kept: the same command' in told and told.count('Interrupted')==1
    assert e.value.code==130 and not (out/'interrupted.pth').exists() and [o.name for o in kept.iterdir()]==['0.pkl'] and not record_of(out)['runs']
    (kept/'1.pkl').write_bytes((kept/'0.pkl').read_bytes()[:1000])  # a broken file is made again
    main(args)
    (again,),whole = record_of(out)['runs'],record_of(done)['runs'][0]
    assert len(fits)==3 and fits[2]==fits[1]<fits[0]
    assert [(o['step'],o['accuracy'],o['before'],o['parameters']) for o in again['report']]==[(o['step'],o['accuracy'],o['before'],o['parameters']) for o in whole['report']]
    assert again['history']==whole['history'] and not (out/'steps').exists()

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
    steps = [pruning(.3),pruning(.3),Step('distill', noop)]
    whole = pipeline(chain(), steps, short, folder=tmp_path/'whole')
    shutil.copytree(tmp_path/'whole', tmp_path/'part')
    for i in (1,2): (tmp_path/f'part/{i}.pkl').unlink()
    set_seed(9)
    again = pipeline(chain(), steps, short, folder=tmp_path/'part')
    assert all(torch.equal(a, b) for a,b in zip(whole[-1].network.parameters(), again[-1].network.parameters()))
    assert [o.accuracy for o in whole]==[o.accuracy for o in again] and [o.before is None for o in whole]==[True,False,False,False]

def test_a_pipeline_knows_its_own(chain, tmp_path, quiet):
    pipeline(chain(), [pruning(.3)], short, folder=tmp_path)
    other = distill_learner(chain().dls, None, wrn(10, 1), metrics=accuracy)
    for learn,step,seed in ((chain(), pruning(.5), 0), (chain(), pruning(.3), 1), (other, pruning(.3), 0)):
        before = count_params(learn.student)
        with pytest.raises(ValueError, match='holds the stages of another pipeline'): pipeline(learn, [step], short, seed=seed, folder=tmp_path)
        assert count_params(learn.student)==before
    for step in (lambda learn: learn.prune(.3), partial(Learner.prune, ratio=.3)):
        with pytest.raises(ValueError, match='needs a name, got <'): pipeline(chain(), [step], short, folder=tmp_path)

def test_a_pipeline_needs_an_accuracy(chain):
    with pytest.raises(ValueError, match='metrics=accuracy'): pipeline(chain(metrics=error_rate), [pruning(.3)], short)
    stages = pipeline(chain(metrics=[error_rate,accuracy]), [Step('as is', noop, trains=False)], short)
    assert stages[0].accuracy==stages[1].accuracy==pytest.approx(accuracy_of(stages[0].network, chain().dls))
    with pytest.raises(ValueError, match='only prepared for int8'): pipeline(chain(), [Learner.quantize_aware], short)

@pytest.mark.slow
def test_files_on_the_way(done, tmp_path):
    "Each row of the report is of the network as it was then"
    main(['compress', *quick[:2], '--epochs', '1', '--teacher-file', str(done/'teacher.pth'), '--steps', 'onnx,prune:.5', '--out', str(tmp_path/'out')])
    start,first,pruned,last = record_of(tmp_path/'out')['runs'][0]['report']
    assert [o['parameters'] for o in (first,last)]==[o['parameters'] for o in (start,pruned)] and first['MB on disk']>2*last['MB on disk']
    assert {o.name for o in (tmp_path/'out').glob('*.onnx')}=={'student-onnx-prune-.5-1.onnx','student-onnx-prune-.5.onnx'}

@pytest.mark.slow
def test_other_steps(done, tmp_path):
    steps = 'swap:separable,program;distill:wrn-10-0.5,int8:aware;int8'
    main(['compress', *quick[:2], '--epochs', '1', '--teacher-file', str(done/'teacher.pth'), '--steps', steps, '--out', str(tmp_path/'out')])
    swapped,fresh,alone = record_of(tmp_path/'out')['runs']
    assert (tmp_path/'out/student-swap-separable-program.pt2').exists() and swapped['parameters']==count_params(swap_convs(wrn(10, 1), Separable)[0])
    assert fresh['report'][1]['parameters']==count_params(wrn(10, .5)) and [o['step'] for o in fresh['report']]==['as it was','distill:wrn-10-0.5','int8:aware','onnx']
    assert alone['history']=={} and abs(alone['accuracy']-alone['report'][0]['accuracy'])<.03

@pytest.mark.slow
def test_labels_alone(done, tmp_path):
    main(['compress', *quick, '--steps', 'prune:.5', '--method', 'control', '--teacher-file', str(done/'teacher.pth'), '--out', str(tmp_path/'out')])
    run, = record_of(tmp_path/'out')['runs']
    assert list(run['history'])==['train_loss','valid_loss','accuracy']

bad = {'shrink:.5':"Unknown step 'shrink': choose from swap, distill, prune", 'int8,prune:.5':'is quantized', 'int8,int8':'int8 already', 'int8:aware,int8':'int8 already', 'distill:resnet11':'Unknown network', 'swap:sparable':'Unknown convolution', 'prune':'is written as prune:.5', 'prune:.5:l3':"Unknown importance 'l3': choose from l1, l2", 'prune:energy=.5':'prune has no energy: it takes ratio, params, macs', 'factorize:x':'is no number',
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
