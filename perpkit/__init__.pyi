from .evaluation.perplexity import perplexity as perplexity
from .evaluation.zero_shot import zero_shot as zero_shot
from .experiments.grid import Experiment as Experiment
from .experiments.grid import Grid as Grid
from .experiments.store import Store as Store
from .experiments.sweep import sweep as sweep
from .interactive.explorers import SparsityExplorer as SparsityExplorer
from .interactive.plots import plot_curves as plot_curves
from .interactive.plots import save_figure as save_figure
from .pruning.masks import Masks as Masks
from .pruning.prune import prune as prune
from .pruning.storage import storage as storage
from .retraining.adapters import attach as attach
from .retraining.adapters import merge as merge
from .retraining.reconstruct import reconstruct as reconstruct
from .retraining.retrain import retrain as retrain
from .retraining.subsets import subset_parameters as subset_parameters
from .retraining.subsets import trainable_share as trainable_share
from .retraining.subsets import untie_head as untie_head
from .sources.models import load_model as load_model
from .sources.outliers import plant_outliers as plant_outliers
from .sources.text import Text as Text
from .sources.text import load_text as load_text

__version__: str
