"""The classic TuningCriterion, for our strategies, and loud where Neural Compressor would ignore them."""

from typing import Any

from mpq_plugins.errors import SettingError

from ..shared.compressor_quiet import quiet_import

try:
    with quiet_import():
        from neural_compressor.config import TuningCriterion as ClassicTuningCriterion
except ImportError as error:
    raise ImportError(
        "the classic Neural Compressor, 3.7 or earlier, is not here: pip install 'mpq-plugins[inc-classic]' in an "
        "environment of its own, or use mpq_plugins.adapters.inc with 3.8 or later"
    ) from error

STRATEGIES = ("mixquant", "ptilmpq", "plan")


class TuningCriterion(ClassicTuningCriterion):  # type: ignore[misc]  # Neural Compressor has no types
    """Names one of our strategies, which Neural Compressor's own refuses; the other arguments are its.

    In `fit`, quant_level must be 1: with another Neural Compressor would run a strategy of its own without a word, and
    SettingError says so.

    Args:
        strategy: `mixquant`, `ptilmpq` or `plan`.
        strategy_kwargs: The allocator's parameters (`qem`, `alpha`, ...; of `plan`, `plan`: a Plan, its file or a
            list), each with one value or a list of values to try; `scheme`, `skip`; and for approach="static"
            `int8_below`.
        timeout: Seconds after which Neural Compressor tries no more; 0 for no limit.
        max_trials: How many trials there are at most.
        objective: Neural Compressor's.

    Raises:
        SettingError: The strategy is another.

    Examples:
        >>> from mpq_plugins.adapters import inc_classic
        >>> inc_classic.TuningCriterion("mixquant", {"qem": [4, 3, 2]}).strategy
        'mixquant'
    """

    def __init__(
        self,
        strategy: str = "mixquant",
        strategy_kwargs: dict[str, Any] | None = None,
        timeout: float = 0,
        max_trials: int = 100,
        objective: Any = "performance",
    ) -> None:
        self.taken = False
        super().__init__(strategy, strategy_kwargs, timeout, max_trials, objective)

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return self._strategy

    @strategy.setter
    def strategy(self, strategy: str) -> None:
        if strategy not in STRATEGIES:
            raise SettingError(f"strategy: {strategy!r} is not allowed; {', '.join(STRATEGIES)}")
        self._strategy = strategy

    @property
    def objective(self) -> Any:
        """What is optimised. Every strategy reads it as it is made, which tells us whose turn it is."""
        if not self.taken:
            raise SettingError(
                f"quant_level: must be 1 for the strategy {self.strategy!r}, which is ignored otherwise; "
                "PostTrainingQuantConfig(quant_level=1, ...)"
            )
        return self._objective

    @objective.setter
    def objective(self, objective: Any) -> None:
        ClassicTuningCriterion.objective.fset(self, objective)
