"What `kdfast doctor` tells"
from importlib.metadata import PackageNotFoundError
from fastai.vision.all import *
import kdfast.doctor
from kdfast.cli import main
from kdfast.doctor import doctor, missing

def _without(monkeypatch, **gone):
    real = kdfast.doctor.version
    def version(name):
        if name not in gone: return real(name)
        if gone[name] is None: raise PackageNotFoundError(name)
        return gone[name]
    monkeypatch.setattr(kdfast.doctor, 'version', version)

def test_what_is_missing_is_named_with_the_command(monkeypatch):
    _without(monkeypatch, onnxscript=None, **{'torch-pruning':'1.0'})
    assert missing('onnx')==['onnxscript'] and missing('prune')==['torch-pruning>=1.5, found 1.0'] and missing('factorize')==missing()==[]
    told = doctor()
    assert "onnxscript: pip install 'kdfast[onnx]'" in told and 'Required but missing' not in told

def test_a_base_package_that_is_missing(monkeypatch):
    _without(monkeypatch, fastai='2.0')
    assert missing()==['fastai>=2.8.12, found 2.0'] and missing('onnx')==[] and doctor().endswith('Required but missing: fastai>=2.8.12, found 2.0: pip install kdfast')

def test_data_are_found_where_fastai_keeps_them(monkeypatch, tmp_path):
    monkeypatch.setattr(kdfast.doctor, 'fastai_path', lambda o: tmp_path/o)
    (tmp_path/'data'/'imagenette2-160').mkdir(parents=True)
    lines = {o.split()[0]:o for o in doctor().splitlines() if o.strip()}
    assert lines['imagenette_160'].endswith('data/imagenette2-160') and 'pass --path' in lines['cifar10']

def test_extras_are_those_that_the_project_promises(capsys):
    main(['doctor'])
    told = capsys.readouterr().out
    assert all(f'\n  {o} ' in told for o in ('prune','factorize','onnx','sweep','torch','bfloat16'))
