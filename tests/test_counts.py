"The numbers of the papers, to the last parameter"
import pytest, timm, torchvision
from fastai.vision.all import *
from kdfast.all import *
from kdfast.experiments.spec import network_of

kinds = [Full,Dilated2x2,Separable]
table = {(40,2): [(2248954,2243546), (1012474,1007066), (304074,293514)],
         (40,1): [(566650,563930),   (256890,254170),   (87882,82570)],
         (16,2): [(693498,691674),   (317178,315354),   (101578,98186)],
         (16,1): [(175994,175066),   (81274,80346),     (29642,27914)]}

@pytest.mark.parametrize('size', table, ids=str)
@pytest.mark.parametrize('kind', range(3), ids=[k.__name__ for k in kinds])
def test_wrn(size, kind):
    net = wrn(*size, conv=kinds[kind])
    assert (count_params(net, buffers=True),count_params(net))==table[size][kind]

def test_wrn_28_10():
    net = wrn(28, 10)
    assert count_params(net)==36_479_194
    assert round(count_macs(net, 32)/1e9, 4)==5.2433

def test_resnets():
    assert count_params(resnet(34, 1000))==21_797_672 and count_params(resnet(18, 1000))==11_689_512
    assert count_params(resnet(34, 1000, conv=Separable), buffers=True)==3_163_752
    assert count_params(resnet(18, 1000, width=.5))==3_055_880

of_cifar = dict(resnet20=278_324, resnet32=472_756, resnet56=861_620, resnet110=1_736_564, resnet8x4=1_233_540, resnet32x4=7_433_860, resnet50=23_705_252,
    vgg8=3_965_028, vgg13=9_462_180, mobilenetv2=812_836, shufflenetv1=949_258, shufflenetv2=1_355_528)

@pytest.mark.parametrize('name', of_cifar)
def test_networks_for_cifar(name):
    "At 100 classes, as arXiv:1910.10699 has them"
    net = network_of(f'cifar-{name}')(n_out=100)
    assert count_params(net)==of_cifar[name]
    with torch.no_grad(): assert net.eval()(torch.zeros(2,3,32,32)).shape==(2,100)

def test_other_networks_for_cifar():
    with pytest.raises(ValueError, match='network for CIFAR'): network_of('cifar-resnet18')
    assert [*pair_layers(cifar_net('resnet8x4'), cifar_net('resnet32x4'), torch.zeros(2,3,32,32))]==['layer1','layer2','layer3']

def test_wide_networks_for_cifar_100(): assert [count_params(wrn(*o, n_out=100)) for o in ((40,2),(16,2),(40,1))]==[2_255_156,703_284,569_780]

class OfTokens(nn.Module):
    "A layer of tokens, given an image"
    def __init__(self, layer, again=False):
        super().__init__()
        self.layer,self.again = layer,again
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        out = self.layer(*[tokens]*(3 if self.again else 1))
        return out[0] if isinstance(out, tuple) else out

n,d = 64,32
attended = 4*n*d*d + 2*n*n*d
layers = {'attention':(OfTokens(nn.MultiheadAttention(d, 4, batch_first=True), True), attended),
    'encoder':(OfTokens(nn.TransformerEncoderLayer(d, 4, d, batch_first=True)), attended + 2*n*d*d),
    'lstm':(OfTokens(nn.LSTM(d, 16, batch_first=True)), n*4*16*(d+16)), 'gru':(OfTokens(nn.GRU(d, 16, batch_first=True)), n*3*16*(d+16)),
    'two ways, two layers':(OfTokens(nn.LSTM(d, 16, num_layers=2, bidirectional=True, batch_first=True)), 2*n*4*16*(d+16 + 32+16))}

@pytest.mark.parametrize('device', ['cpu','meta'])
@pytest.mark.parametrize('name', layers)
def test_fused_layers_are_counted(name, device):
    net,right = layers[name]
    before = [torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.flags, torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled]
    assert count_macs(deepcopy(net).to(device), (d,8,8))==right
    assert before==[torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.flags, torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled]

def test_transformers():
    assert count_macs(torchvision.models.vit_b_16(), 224)==17_563_828_224
    assert count_macs(timm.create_model('vit_tiny_patch16_224'), 224)==1_253_683_200
