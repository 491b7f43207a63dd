"""Training on packed text: resumable to the bit, interruptible, recorded."""

from seqmodels.train.config import InitialKind as InitialKind
from seqmodels.train.config import InitialState as InitialState
from seqmodels.train.config import MeshConfig as MeshConfig
from seqmodels.train.config import TrainConfig as TrainConfig
from seqmodels.train.evaluate import make_evaluator as make_evaluator
from seqmodels.train.initial import fit_moments as fit_moments
from seqmodels.train.interrupt import Interrupted as Interrupted
from seqmodels.train.length import effective_remembrance as effective_remembrance
from seqmodels.train.length import loss_by_position as loss_by_position
from seqmodels.train.length import state_statistics as state_statistics
from seqmodels.train.loop import Result as Result
from seqmodels.train.loop import train as train
from seqmodels.train.optimizer import make_optimizer as make_optimizer
from seqmodels.train.run import RunMismatch as RunMismatch
from seqmodels.train.step import language_model_loss as language_model_loss
