"One of two processes (or the only one): trains as `test_processes` asks and saves the weights it ends with"
from fastai.vision.all import *
from kdfast.all import *
from kdfast.layers.adapters import adapters_of

class FreezeNorms(Callback):
    "Batch norms in eval, so that two halves of a batch are what the whole is"
    order = 0
    def before_train(self):
        for m in self.learn.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()

class Alone(Callback):
    "Each process trains on its part of the data, and no gradient is synchronized"
    order = 12
    def before_fit(self): self.learn.model.require_backward_grad_sync = False

class CountSynced(Callback):
    "Batch norms that are synchronized while it trains"
    n = 0
    def before_batch(self): self.n = sum(isinstance(m, nn.SyncBatchNorm) for m in self.learn.model.modules())

def fail(m, args, out):
    if len(out)>2: raise RuntimeError('a broken teacher')

def weights(model):
    beside = {f'adapters.{k}':v for k,v in nn.ModuleDict(adapters_of(model)).state_dict().items()}
    return {k.removeprefix('module.'):v.detach().clone() for k,v in {**model.state_dict(), **beside}.items()}

def main(how, file):
    torch.set_num_threads(1)
    n,whole = max(1, num_distrib()),how=='norms'
    set_seed(0)
    if how=='gpus': torch.cuda.set_device(rank_distrib())
    dls = digits_dls(64//n, per_class=40, seed=1, size=16, valid=64, pad=0 if whole else None, device='cpu' if how=='synced' else None)  # a string, as users give it
    if whole: dls = tensor_dls(*((first64(dls)),)*2, bs=64//n, stats=digits_stats)
    teacher = wrn(10, 2)
    terms = {'beside':[CRD(), DML(), FactorTransfer()], 'two-stages':[FactorTransfer(), FitNet(), KD()], 'shared':[KD(share=.3), FitNet(share=.2)], 'equal':[KD(), AT(), FitNet()], 'added':[KD()]}.get(how, [KD(), AT(weight=1e3), FitNet(weight=100.)])
    learn = Learner(dls, wrn(10, 1)) if how=='plain' else distill_learner(dls, teacher, wrn(10, 1), cbs=terms, opt_func=SGD, metrics=accuracy)
    if how=='added': learn.add_cb(FitNet(weight=100.))
    if whole: learn.add_cb(FreezeNorms())
    if how=='alone': learn.add_cb(Alone())
    learn.add_cb(CountSynced())
    if how in ('cached','failing'): learn.add_cb(TeacherCache(f'{file}-cache', views=2))
    if how=='failing' and rank_distrib(): teacher.register_forward_hook(fail)
    dls.train.rng.seed(rank_distrib())
    before = weights(learn.model)
    with learn.no_bar(), learn.no_logging():
        with learn.distrib_ctx(sync_bn=False, cpu=True) if how=='alone' else all_processes(learn):
            if how in ('stagewise','parallel'): learn.fit_blocks(1, head=1, mode=how)
            elif how=='two-stages': learn.fit_two_stages(1, 1, 1e-3)
            else: learn.fit(2, 2e-4 if whole else 1e-3)
    torch.save(dict(before=before, after=weights(learn.model), history=learn.recorder.history.to_dict('list'), kept=type(learn.model).__name__, sync=learn.count_synced.n), f'{file}.{rank_distrib()}')

def first64(dls):
    xs,ys = dls.train_ds.tls
    return xs.tfms.fs[0].images[:64],ys.tfms.fs[0].labels[:64]

if __name__=='__main__': main(*sys.argv[1:])
