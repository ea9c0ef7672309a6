"""One rule a layer family; importing this package registers them."""

from kfac_laplace.curvature.layers import attention as attention
from kfac_laplace.curvature.layers import contraction as contraction
from kfac_laplace.curvature.layers import conv as conv
from kfac_laplace.curvature.layers import conv_transpose as conv_transpose
from kfac_laplace.curvature.layers import elementwise as elementwise
from kfac_laplace.curvature.layers import embedding as embedding
from kfac_laplace.curvature.layers import linear as linear
from kfac_laplace.curvature.layers import norm as norm
from kfac_laplace.curvature.layers import recurrent as recurrent
from kfac_laplace.curvature.layers.registry import FORMS as FORMS
from kfac_laplace.curvature.layers.registry import GUARDS as GUARDS
from kfac_laplace.curvature.layers.registry import OPERATORS as OPERATORS
from kfac_laplace.curvature.layers.registry import REPETITIONS as REPETITIONS
from kfac_laplace.curvature.layers.registry import RULES as RULES
from kfac_laplace.curvature.layers.registry import Guard as Guard
from kfac_laplace.curvature.layers.registry import Layer as Layer
from kfac_laplace.curvature.layers.registry import equivalent_form as equivalent_form
from kfac_laplace.curvature.layers.registry import guard as guard
from kfac_laplace.curvature.layers.registry import layer_rule as layer_rule
from kfac_laplace.curvature.layers.registry import operator_rule as operator_rule
from kfac_laplace.curvature.layers.registry import repetition_rule as repetition_rule
from kfac_laplace.curvature.rows.inputs import Inputs as Inputs
from kfac_laplace.curvature.rows.inputs import Rows as Rows
from kfac_laplace.curvature.rows.layout import Fold as Fold
