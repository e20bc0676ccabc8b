"""Learning and judging: data sets, SFT, RRHF, ModelTokens, agents, evaluation."""
