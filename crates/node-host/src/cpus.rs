//! CPUs as a flag names them.

use std::fmt;
use std::str::FromStr;

/// Larger numbers are slips: no machine has so many.
const CPU_MAX: usize = 65_535;

/// CPUs, each once, in the order in which they were named: `0-3,8`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| match text.trim().parse::<usize>() {
            Ok(cpu) if cpu <= CPU_MAX => Ok(cpu),
            _ => Err(format!("`{text}` is no CPU: give numbers and ranges, such as 0-3,8")),
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(format!("`{part}` ends before it begins"));
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(format!("CPU {cpu} is named twice"));
                }
                cpus.push(cpu);
            }
        }
        Ok(Self(cpus))
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&names.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_ranges_are_cpus_and_nothing_else_is() {
        let list: CpuList = "8,0-2".parse().unwrap();
        assert_eq!(list.0, [8, 0, 1, 2]);
        assert_eq!(list.to_string().parse(), Ok(list));
        for (text, why) in [
            ("", "no CPU"),
            ("0-", "no CPU"),
            ("-1", "no CPU"),
            ("0-99999999", "no CPU"),
            ("3-1", "ends before"),
            ("0-3,2", "twice"),
        ] {
            let error = text.parse::<CpuList>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
