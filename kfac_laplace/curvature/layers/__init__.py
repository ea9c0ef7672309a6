"""One rule a layer family; importing this package registers them."""

from kfac_laplace.curvature.layers import conv as conv
from kfac_laplace.curvature.layers import elementwise as elementwise
from kfac_laplace.curvature.layers import linear as linear
from kfac_laplace.curvature.layers.registry import RULES as RULES
from kfac_laplace.curvature.layers.registry import Layer as Layer
from kfac_laplace.curvature.layers.registry import layer_rule as layer_rule
