"""Control flows, one file each."""

from .auto import Auto
from .bandit import Bandit
from .big_little import BigLittle
from .branches import StepEnd
from .early_exit import EarlyExitLossy
from .guided import AStar, EarlyRejection, ParticleFilter
from .keyed_sampler import PositionKeyedSampler
from .micro_steps import MicroHead, MicroSteps
from .monitor import Monitor
from .reverse import ReverseSpeculative
from .stats import DecodeStats
from .step_scores import AnswerFound, JudgeScore, LogProbabilityScore
from .step_speculative import StepSpeculative
from .tree_run import TreeSpeculationOutput
from .tree_speculation import TreeSpeculation
from .votes import BestOfMajority, BestOfN, ShortMAtK

__all__ = [
    "AStar",
    "AnswerFound",
    "Auto",
    "Bandit",
    "BestOfMajority",
    "BestOfN",
    "BigLittle",
    "DecodeStats",
    "EarlyExitLossy",
    "EarlyRejection",
    "JudgeScore",
    "LogProbabilityScore",
    "MicroHead",
    "MicroSteps",
    "Monitor",
    "ParticleFilter",
    "PositionKeyedSampler",
    "ReverseSpeculative",
    "ShortMAtK",
    "StepEnd",
    "StepSpeculative",
    "TreeSpeculation",
    "TreeSpeculationOutput",
]
