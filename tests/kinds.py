"Every kind of convolution, at a setting that 8, 16 and 32 channels allow"
from functools import partial
from kdfast.all import *

kinds = dict(Full=Full, Dilated2x2=Dilated2x2, Grouped=partial(Grouped, groups=4), Grouped_size=partial(Grouped, group_size=4), Separable=Separable, Separable_linear=partial(Separable, linear=True),
    SeparableGrouped=partial(SeparableGrouped, groups=4), SeparableGrouped_size=partial(SeparableGrouped, group_size=2), Bottleneck=Bottleneck, Bottleneck_grouped=partial(Bottleneck, b=2, middle=partial(Grouped, groups=2)),
    Bottleneck_depthwise=partial(Bottleneck, b=2, middle=partial(Grouped, group_size=1)), SeparableChannelwise=SeparableChannelwise, Shuffle=Shuffle, LowRank=partial(LowRank, ratio=.5),
    LowRank_rank=partial(LowRank, rank=3), Hashed=partial(Hashed, ratio=.1), Hashed_budget=partial(Hashed, budget=32), SeparableHashed=partial(SeparableHashed, ratio=.5), ACDC=ACDC,
    TensorTrain=partial(TensorTrain, ratio=.5), Tucker=partial(Tucker, ratio=.5), CP=partial(CP, ratio=.5))
