//! Values of the flags of `baton plan`.

use baton_planner::search::Prices;
use std::str::FromStr;

/// So many nodes, of one kind where it is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    pub nodes: usize,
    pub gpu: Option<String>,
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no budget: expected a number of nodes such as 32, or 32xh100");
        let (nodes, gpu) = match text.split_once('x') {
            Some((nodes, gpu)) if !gpu.is_empty() => (nodes, Some(gpu.to_owned())),
            Some(_) => return Err(wrong()),
            None => (text, None),
        };
        let nodes: usize = nodes.parse().map_err(|_| wrong())?;
        if !(2..=1024).contains(&nodes) {
            return Err(format!(
                "{nodes} nodes: between 2 (one prefills, one decodes) and 1024 can be planned"
            ));
        }
        Ok(Self { nodes, gpu })
    }
}

/// Prices per hour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PriceList(pub Prices);

impl FromStr for PriceList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is no price list: expected prefill=COST,decode=COST per node and hour, such as prefill=2.5,decode=2"
            )
        };
        let (mut prefill, mut decode) = (None, None);
        for part in text.split(',') {
            let (name, cost) = part.split_once('=').ok_or_else(wrong)?;
            let cost: f64 = cost.trim().parse().map_err(|_| wrong())?;
            parse_cost(cost).map_err(|_| wrong())?;
            match name.trim() {
                "prefill" => prefill = Some(cost),
                "decode" => decode = Some(cost),
                _ => return Err(wrong()),
            }
        }
        match (prefill, decode) {
            (Some(prefill), Some(decode)) => Ok(Self(Prices { prefill, decode })),
            (_, _) => Err(wrong()),
        }
    }
}

/// What a node costs per hour.
pub fn parse_cost(cost: f64) -> Result<f64, String> {
    if cost.is_finite() && cost > 0.0 {
        return Ok(cost);
    }
    Err(format!("{cost} is no cost per hour: expected a number above 0"))
}

/// Requests per second.
pub fn parse_rate(text: &str) -> Result<f64, String> {
    let rate: Option<f64> = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| format!("`{text}` is no rate: expected requests per second, without a unit, such as 12.5"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_wrong_ones_say_what_is_expected() {
        let budget: Budget = "32xh100".parse().unwrap();
        assert_eq!((budget.nodes, budget.gpu.as_deref()), (32, Some("h100")));
        assert_eq!("8".parse::<Budget>().unwrap().gpu, None);
        for bad in ["x", "h100", "32x", "-1"] {
            assert!(bad.parse::<Budget>().unwrap_err().contains("32xh100"), "{bad}");
        }
        assert!("1".parse::<Budget>().unwrap_err().contains("between 2"));
        let prices: PriceList = "prefill=2.5, decode=1".parse().unwrap();
        assert_eq!((prices.0.prefill, prices.0.decode), (2.5, 1.0));
        for bad in [
            "2.5",
            "prefill=2.5",
            "prefill=a,decode=1",
            "prefill=1,decode=-1",
            "both=1,decode=1",
        ] {
            assert!(bad.parse::<PriceList>().unwrap_err().contains("prefill=COST"), "{bad}");
        }
        assert_eq!(parse_rate("12.5"), Ok(12.5));
        assert!(parse_rate("12.5/s").unwrap_err().contains("requests per second"));
    }
}
