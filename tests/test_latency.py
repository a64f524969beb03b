"Milliseconds as a target: in the file that will serve, on the machine that will"
import sys, pytest
from fastai.vision.all import *
from kdfast.all import *
from kdfast import predict
from kdfast.predict import main

elsewhere = dict(on='sh -c', python=sys.executable)

def small(width): return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

@pytest.mark.slow
@pytest.mark.parametrize('form,int8', [('.onnx',False), ('.onnx',True), ('.xml',False), ('.pte',False), ('.pte',True)])
def test_a_larger_network_takes_longer(form, int8):
    runtime = Runtime(form, int8)
    assert 0<runtime(small(4), 16)<runtime(small(32), 32)

@pytest.mark.slow
@pytest.mark.parametrize('form', ['.onnx','.xml','.pte'])
def test_another_machine(form, tmp_path, monkeypatch):
    "With other temporary files, of which nothing is left"
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    assert Runtime(form, **elsewhere)(small(4), 16)>0
    assert not [o for o in tmp_path.iterdir() if o.name.startswith('tmp.')]

def test_the_budget_is_met_in_the_runtime():
    asked = []
    def runtime(net, size):
        asked.append((count_params(net),size))
        return count_params(net)/1e4
    fit = fit_budget(partial(wrn, 10), ms=10., over=(.25,4.), size=16, runtime=runtime)
    assert len(asked)<=9 and {s for _,s in asked}=={16} and fit.count==count_params(fit.model)/1e4<=10
    assert count_params(wrn(10, fit.setting+3.75/64))>1e5

@pytest.mark.slow
def test_grey_images_and_what_is_left_of_the_network():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).train()
    before = {k:v.clone() for k,v in net.state_dict().items()}
    state = torch.get_rng_state()
    assert Runtime(int8=True)(net, (1,20,30))>0
    assert net.training and all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and torch.equal(state, torch.get_rng_state())

@pytest.mark.parametrize('call,error,message', [
    (lambda: Runtime('.bin'), ValueError, 'No form for student.bin: its suffix must be .onnx'),
    (lambda: Runtime(on='sh -c', python='no-such-python')(wrn(10, .25), 16), RuntimeError, "could not be timed by 'sh -c' .*no-such-python.*numpy and the runtime"),
    (lambda: Runtime()(nn.Conv2d(3, 4, 1), 8), ValueError, 'times classifiers'),
    (lambda: Runtime()(wrn(10, .25), 'a'), ValueError, 'size must be a side'),
    (lambda: fit_budget(partial(wrn, 10), params=9, runtime=Runtime()), ValueError, 'A runtime measures milliseconds'),
    (lambda: main(['student.onnx']), SystemExit, '2')])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message): call()

@pytest.mark.slow
@pytest.mark.parametrize('form', ['.onnx','.xml','.pte'])
def test_what_is_timed_is_what_is_deployed(form, dls, tmp_path, monkeypatch):
    "Up to weights and normalization: the same layers on the same pixels"
    timed = []
    monkeypatch.setattr(Runtime, 'of_file', lambda self, file: timed.append((file.stat().st_size,predict.DeployedModel(file).shape)))
    learn = distill_learner(dls, None, wrn(10, 1), path=tmp_path)
    Runtime(form)(learn.student, 16)
    learn.deploy(f'student{form}', agree=0)
    size,shape = timed[0]
    file = tmp_path/f'student{form}'
    assert shape==predict.DeployedModel(file).shape and size==pytest.approx(file.stat().st_size, rel=.05)

@pytest.mark.skipif(sys.platform=='darwin', reason='it runs there')
def test_core_ml_is_timed_on_a_mac():
    with pytest.raises(ValueError, match='runs on macOS alone: pass on= with a command'): Runtime('.mlpackage')
    assert Runtime('.mlpackage', on='ssh mac').form=='.mlpackage'
